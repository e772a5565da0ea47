"""The script of a user that trains; what it does beyond that, its argument says, as JSON.

source      "settings", or "arguments": a TrainingArguments at the top
trainer     arguments of the Trainer
plain       with lightning.Trainer
settings    further settings
map         a map function, whose calls are counted
fault       "raise", "kill", "stop", "exit": on rank `victim`, in its second step, once; "none"; "kill later":
            `after_s` after training has begun
resumes     from the last checkpoint, if there is one
step_s      what a step waits
rows        of the training set
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments

ARGV, FOLDER = list(sys.argv), Path.cwd()
JOB = json.loads(sys.argv[1])
VALUES = {
    "output_dir": "out",
    "use_cpu": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": not JOB.get("bar"),
    **JOB.get("settings", {}),
}
ARGUMENTS = TrainingArguments(**VALUES) if JOB.get("source") == "arguments" else None

import lightning.pytorch as pl  # noqa: E402

import hfbridge  # noqa: E402
from tests.parity.engines import weights_digest  # noqa: E402
from tests.tiny import PadRows, make_dataset, make_model  # noqa: E402


class Fault(TrainerCallback):
    """Does what a rank may suffer, in the middle of a run."""

    def on_train_begin(self, args, state, control, **others):  # type: ignore[no-untyped-def]
        rank, marker = int(os.environ["RANK"]), FOLDER / "fault"
        if JOB["fault"] == "kill later" and rank == JOB["victim"] and not marker.exists():
            marker.touch()
            end = threading.Timer(JOB["after_s"], os.kill, (os.getpid(), signal.SIGKILL))
            end.daemon = True
            end.start()

    def on_step_begin(self, args, state, control, **others):  # type: ignore[no-untyped-def]
        rank, marker = int(os.environ["RANK"]), FOLDER / "fault"
        (FOLDER / f"step-{state.global_step}-{rank}").touch()
        time.sleep(JOB.get("step_s", 0))
        is_now = state.global_step == 1 and rank == JOB.get("victim", 1)
        is_now = is_now and JOB["fault"] not in ("none", "kill later")
        if not is_now or marker.exists():
            return
        marker.touch()
        if JOB["fault"] == "raise":
            raise ValueError("this rank has an error")
        if JOB["fault"] == "exit":
            sys.exit(3)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[JOB["fault"]])


def count_calls(rows: dict[str, list[object]]) -> dict[str, list[object]]:
    """Leave the rows as they are, and count the calls."""
    with (FOLDER / "calls").open("a") as calls:
        calls.write(f"{len(rows['input_ids'])}\n")
    return {"labels": rows["labels"]}


def main() -> None:
    """Train, and write down what came of it."""
    (FOLDER / f"process-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    settings = ARGUMENTS or hfbridge.Settings(**VALUES)
    if not JOB.get("plain"):  # children start as the script did, whatever it has done since
        sys.argv[:] = ["another", "name"]
        elsewhere = FOLDER / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        os.chdir(elsewhere)
    callbacks = [Fault()] if "fault" in JOB else []
    given = {"settings": settings} if JOB.get("plain") else {}
    module = hfbridge.HFModule(make_model("llama"), **given)
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("llama", JOB.get("rows", 21)),
        map_function=count_calls if JOB.get("map") else None,
        data_collator=PadRows(),
    )
    asked = {"enable_model_summary": False, "logger": False, **JOB.get("trainer", {})}
    if JOB.get("plain"):
        quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 1}
        trainer = pl.Trainer(accelerator="cpu", **quiet, **asked)
    else:
        trainer = hfbridge.Trainer(settings, callbacks=callbacks, **asked)
    has_last = JOB.get("resumes") and any(Path(VALUES["output_dir"]).glob("checkpoint-*"))
    trainer.fit(module, data, ckpt_path="last" if has_last else None)
    result = {
        "resumed": bool(has_last),
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__module__.split(".")[0],
        "argv": ARGV[1:],
        "rows": [row for row in module.log_history if "loss" in row],
        "trained_s": module.log_history[-1]["train_runtime"],
        "weights": weights_digest(module.model),
        "attempt": os.environ.get("TORCHELASTIC_RESTART_COUNT"),
    }
    (FOLDER / f"result-{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
