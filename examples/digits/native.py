"""Read handwritten digits with transformers.Trainer; bridge.py does the same with hfbridge."""

import numpy as np
import transformers
from task import SETTINGS, SIZES, arguments, compute_metrics, read, report
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessorPil

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForImageClassification.from_config(ViTConfig(**SIZES))
processor = ViTImageProcessorPil(do_resize=False, rescale_factor=1 / 16, image_mean=[0.5], image_std=[0.5])


def prepare(rows):
    images = np.asarray(rows["image"], dtype="float32")[:, None]  # [rows, channels, height, width]
    return {"pixel_values": processor(list(images), input_data_format="channels_first")["pixel_values"]}


dataset = dataset.map(prepare, batched=True)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=processor,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
