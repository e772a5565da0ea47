"""Translate English into German with hfbridge; native.py does the same with transformers.Seq2SeqTrainer."""

import transformers
from task import SETTINGS, SIZES, Bleu, arguments, read, report, train_tokenizer
from transformers import AutoModelForSeq2SeqLM, BartConfig, DataCollatorForSeq2Seq

import hfbridge

given = arguments()
dataset = read(given)
tokenizer = train_tokenizer(dataset["train"])
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForSeq2SeqLM.from_config(BartConfig(**SIZES, vocab_size=len(tokenizer)))
collator = DataCollatorForSeq2Seq(tokenizer, model)


def tokenize(rows):
    return tokenizer(rows["en"], text_target=rows["de"], truncation=True, max_length=32)


compute_metrics = Bleu(tokenizer)
data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
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
