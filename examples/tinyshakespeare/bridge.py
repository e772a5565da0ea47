"""Teach a small model Shakespeare with hfbridge; native.py does the same with transformers.Trainer."""

import math

import transformers
from task import SETTINGS, arguments, block, read, report
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForCausalLM.from_pretrained(given.model)
tokenizer = AutoTokenizer.from_pretrained(given.model)


def tokenize(rows):
    return block(tokenizer(rows["text"], add_special_tokens=False)["input_ids"])


data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    map_function=tokenize,
    map_kwargs={"remove_columns": ["text"]},
    data_collator=default_data_collator,
)
module = hfbridge.HFModule(
    model,
    processing_class=tokenizer,
    loss_normalization="native",  # the numbers of native.py; left out, those of one large batch
)
trainer = hfbridge.Trainer(SETTINGS)
trainer.fit(module, data)
(metrics,) = trainer.validate(module, data, verbose=False)
report({**metrics, "perplexity": math.exp(metrics["eval_loss"])}, given)
