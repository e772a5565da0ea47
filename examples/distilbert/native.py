"""Fine-tune DistilBERT, start to end, with transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from task import SETTINGS, accuracy, arguments, load, read, report

given = arguments()
dataset = read(train=64, validation=32) if given.tiny else read()
transformers.set_seed(SETTINGS["seed"])
model, tokenizer = load(given)


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=128)


dataset = dataset.map(tokenize, batched=True).rename_column("label", "labels")
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
)
trainer.train()
report(trainer.evaluate(), given)
trainer.save_model("out/distilbert/native/best")
