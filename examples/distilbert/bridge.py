"""Fine-tune DistilBERT, start to end, with hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from task import SETTINGS, accuracy, arguments, load, read, report

import hfbridge

given = arguments()
dataset = read(train=64, validation=32) if given.tiny else read()
transformers.set_seed(SETTINGS["seed"])
model, tokenizer = load(given)


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=128)


dataset = dataset.map(tokenize, batched=True).rename_column("label", "labels")
data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
)
module = hfbridge.HFModule(
    model,
    processing_class=tokenizer,
    compute_metrics=accuracy,
    loss_normalization="native",  # the numbers of native.py; without accumulation "exact" has the same
)
trainer = hfbridge.Trainer(SETTINGS)
trainer.fit(module, data)
report(*trainer.validate(module, data, verbose=False), given)
module.save_pretrained("out/distilbert/bridge/best")
