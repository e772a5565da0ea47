"""A user's script, which knows nothing of hfbridge: trains, evaluates, predicts, saves, ends with a code."""

import argparse
import json
import sys
from pathlib import Path

from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from user_data import collate, make_sets, model_of

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--code", type=int, default=0)
parser.add_argument("--replaces", action="store_true")
parser.add_argument("--deepspeed", type=str)
given = parser.parse_args()


class Own(Trainer):
    """Add a value to each row."""

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "world": self.args.world_size}, *args, **kwargs)


if given.replaces:
    Own._run_epoch = lambda self, *args: None

arguments = TrainingArguments(
    output_dir=str(given.out),
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
    num_train_epochs=2,
    per_device_train_batch_size=4,
    eval_strategy="epoch",
    save_strategy="epoch",
    logging_steps=2,
    learning_rate=1e-2,
    remove_unused_columns=False,
    deepspeed=given.deepspeed,
)
train, evaluation = make_sets()
trainer = Own(model_of(), arguments, collate, train, evaluation)
trainer.train()
trainer.evaluate({"late": evaluation})
trainer.save_model(str(given.out / "final"))
predicted = trainer.predict(evaluation)
if trainer.is_world_process_zero():
    kept = [
        {k: v for k, v in row.items() if "runtime" not in k and "second" not in k}
        for row in trainer.state.log_history
    ]
    facts = {
        "rows": [{k: v for k, v in row.items() if "preparation" not in k} for row in kept],
        "predictions": predicted.predictions[:, :3].tolist(),
        "trainer": [kind.__module__ for kind in (type(trainer).__mro__[1], Seq2SeqTrainer)],
        "argv": sys.argv[1:],
    }
    (given.out / "facts.json").write_text(json.dumps(facts))
sys.exit(given.code)
