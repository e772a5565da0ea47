"""Teach a small model Shakespeare with transformers.Trainer; bridge.py does the same with hfbridge."""

import math

import transformers
from task import SETTINGS, arguments, block, read, report
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForCausalLM.from_pretrained(given.model)
tokenizer = AutoTokenizer.from_pretrained(given.model)


def tokenize(rows):
    return block(tokenizer(rows["text"], add_special_tokens=False)["input_ids"])


dataset = dataset.map(tokenize, batched=True, remove_columns=["text"])
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    data_collator=default_data_collator,
    processing_class=tokenizer,
)
trainer.train()
metrics = trainer.evaluate()
report({**metrics, "perplexity": math.exp(metrics["eval_loss"])}, given)
