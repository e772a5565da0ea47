"""Translate English into German with transformers.Seq2SeqTrainer; bridge.py does the same with hfbridge."""

import transformers
from task import SETTINGS, SIZES, Bleu, arguments, read, report, train_tokenizer
from transformers import AutoModelForSeq2SeqLM, BartConfig, DataCollatorForSeq2Seq

given = arguments()
dataset = read(given)
tokenizer = train_tokenizer(dataset["train"])
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForSeq2SeqLM.from_config(BartConfig(**SIZES, vocab_size=len(tokenizer)))
collator = DataCollatorForSeq2Seq(tokenizer, model)


def tokenize(rows):
    return tokenizer(rows["en"], text_target=rows["de"], truncation=True, max_length=32)


compute_metrics = Bleu(tokenizer)
dataset = dataset.map(tokenize, batched=True)
trainer = transformers.Seq2SeqTrainer(
    model,
    transformers.Seq2SeqTrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    data_collator=collator,
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
