"""The script of a user who moves: a native Trainer, which trains itself or is moved over.

engine      "native", or "moved"
trainer     arguments of from_trainer
settings    further settings
"""

import json
import sys
from pathlib import Path

from transformers import Trainer, TrainingArguments

from tests.parity.engines import weights_digest
from tests.tiny import PadRows, make_dataset, make_model

JOB = json.loads(sys.argv[1])


def main() -> None:
    """Train, and write down what came of it."""
    folder = Path.cwd()
    args = TrainingArguments(
        **{
            "output_dir": "out",
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            **JOB.get("settings", {}),
        }
    )
    rows = make_dataset("llama", 21)
    native = Trainer(
        make_model("llama"), args, train_dataset=rows, eval_dataset=rows, data_collator=PadRows()
    )
    if JOB["engine"] == "native":
        native.train()
        history, model, rank = native.state.log_history, native.model, args.process_index
        world_size, strategy = args.world_size, None
    else:
        import hfbridge

        asked = {"enable_model_summary": False, **JOB.get("trainer", {})}
        trainer, module, data = hfbridge.from_trainer(native, **asked)
        trainer.fit(module, data)
        history, model, rank = module.log_history, module.model, trainer.global_rank
        world_size, strategy = trainer.world_size, trainer.plan.strategy.kind
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss")
    result = {
        "rank": rank,
        "strategy": strategy,
        "world_size": world_size,
        "rows": [{name: row[name] for name in kept if name in row} for row in history],
        "weights": weights_digest(model),
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
