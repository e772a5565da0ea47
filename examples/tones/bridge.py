"""Tell rising tones from falling ones with hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from task import RATE, SETTINGS, SIZES, arguments, compute_metrics, read, report
from transformers import (
    AutoModelForAudioClassification,
    DataCollatorWithPadding,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
)

import hfbridge

given = arguments()
dataset = read(given)
transformers.set_seed(SETTINGS["seed"])
model = AutoModelForAudioClassification.from_config(Wav2Vec2Config(**SIZES))
extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
collator = DataCollatorWithPadding(extractor)


def prepare(rows):
    return extractor(rows["audio"], sampling_rate=RATE)


data = hfbridge.HFDataModule(
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    map_function=prepare,
    data_collator=collator,
)
module = hfbridge.HFModule(
    model,
    processing_class=extractor,
    compute_metrics=compute_metrics,
    loss_normalization="native",  # the numbers of native.py; left out, those of one large batch
)
trainer = hfbridge.Trainer(SETTINGS)
trainer.fit(module, data)
report(*trainer.validate(module, data, verbose=False), given)
