"""Tell rising tones from falling ones with transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from task import RATE, SETTINGS, SIZES, arguments, compute_metrics, read, report
from transformers import (
    AutoModelForAudioClassification,
    DataCollatorWithPadding,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
)

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForAudioClassification.from_config(Wav2Vec2Config(**SIZES))
extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
collator = DataCollatorWithPadding(extractor)


def prepare(rows):
    return extractor(rows["audio"], sampling_rate=RATE)


dataset = dataset.map(prepare, batched=True)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**SETTINGS),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    data_collator=collator,
    processing_class=extractor,
    compute_metrics=compute_metrics,
)
trainer.train()
report(trainer.evaluate(), given)
