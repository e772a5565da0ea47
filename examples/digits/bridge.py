"""Read handwritten digits with hfbridge; native.py does the same with transformers.Trainer."""

import numpy as np
import transformers
from task import SETTINGS, SIZES, arguments, compute_metrics, read, report
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessorPil

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForImageClassification.from_config(ViTConfig(**SIZES))
processor = ViTImageProcessorPil(do_resize=False, rescale_factor=1 / 16, image_mean=[0.5], image_std=[0.5])


def prepare(rows):
    images = np.asarray(rows["image"], dtype="float32")[:, None]  # [rows, channels, height, width]
    return {"pixel_values": processor(list(images), input_data_format="channels_first")["pixel_values"]}


data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    map_function=prepare,
)
module = hfbridge.HFModule(
    model,
    processing_class=processor,
    compute_metrics=compute_metrics,
    loss_normalization="native",  # the numbers of native.py; left out, those of one large batch
)
trainer = hfbridge.Trainer(SETTINGS)
trainer.fit(module, data)
report(*trainer.validate(module, data, verbose=False), given)
