"""What the ranks of a pool run under DeepSpeed."""

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import hfbridge
from tests.distributed.jobs import run_job_on_both
from tests.parity.engines import (
    Job,
    Record,
    make_ours,
    make_theirs,
    record_ours,
    record_theirs,
    same,
    weights_digest,
)
from tests.tiny import PadRows, make_model, make_rows


def connect() -> None:
    """Open the process group, which native leaves to the first model."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def run_zero_job(job: Job) -> dict[str, Any]:
    """Run a job on both engines."""
    connect()
    return run_job_on_both(job)


def _shared_folder(name: str) -> Path:
    """A directory beside those of the ranks, the same to all."""
    told = [os.getcwd() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    folder = Path(str(told[0])).parent / f"{Path(str(told[0])).name}-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def run_by_name(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Validate, predict, train, validate: `Trainer(settings, strategy=name)`."""
    rows = make_rows("distilbert", 22)
    model = make_model("distilbert")
    module = hfbridge.HFModule(model)
    data = hfbridge.HFDataModule(
        train_dataset=rows, eval_dataset=rows[:9], predict_dataset=rows[9:16], data_collator=PadRows()
    )
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_train_epochs": 1,
        **settings,
    }
    trainer = hfbridge.Trainer(settings, strategy=name, enable_model_summary=False)
    before = trainer.validate(module, data)[0]["eval_loss"]
    predicted = trainer.predict_dataset(module, data).predictions
    trainer.fit(module, data)
    after = trainer.validate(module, data)[0]["eval_loss"]
    return {
        "strategy": type(trainer.strategy).__name__,
        "stage": getattr(trainer.strategy, "stage", None),
        "before": before,
        "predicted": predicted,
        "after": after,
        "weights": weights_digest(module.model),
        "is_live": is_deepspeed_zero3_enabled(),
    }


class LooksAtParts(TrainerCallback):
    """See what a rank holds of the model when it has been built, before any engine."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = list(kwargs["model"].parameters())
        self.found = {
            "parameters": len(parameters),
            "in parts": sum(hasattr(p, "ds_id") for p in parameters),
            "held": sum(p.numel() for p in parameters),
        }


def train_in_parts(config: dict[str, Any], is_factory: bool) -> dict[str, Any]:
    """Train a named model, and one from a factory, under ZeRO-3, and the same on the native Trainer."""
    connect()
    folder = _shared_folder("model")
    if dist.get_rank() == 0:
        make_model("distilbert").save_pretrained(folder)
    dist.barrier()

    def load(*_: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder)

    looks = LooksAtParts()
    settings = {"gradient_accumulation_steps": 2, "deepspeed": config}
    job = Job("distilbert", settings, eval_rows=0, model_init=load, callbacks=lambda: [looks])
    if not is_factory:
        job = replace(job, module_arguments=([str(folder), "AutoModelForSequenceClassification"], {}))
    set_seed(1)
    trainer, recorder, collator = make_theirs(job)
    trainer.train()
    theirs = record_theirs(trainer, recorder, collator)
    looks.found = {}
    set_seed(2)
    made = make_ours(job)
    made[0].fit(made[1], made[2])
    ours = record_ours(made[0], made[1], made[3], made[4])
    same("rows", theirs.log_history, ours.log_history)
    same("weights", theirs.weights, ours.weights)
    return looks.found


def save_and_generate(config: dict[str, Any]) -> dict[str, Any]:
    """Train a causal model under ZeRO-3; save it, and generate from it while it is in parts, and whole."""
    connect()
    folder = _shared_folder("saved")
    job = Job("llama", {"num_train_epochs": 1, "deepspeed": config}, eval_rows=0)
    trainer, module, data, *_ = make_ours(job)
    trainer.fit(module, data)
    module.save_pretrained(folder)
    module.model.eval()
    rank = dist.get_rank()
    prompt = torch.tensor([[5, 6, 7, 8 + rank]])
    length = {"max_new_tokens": 3 + 4 * rank, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    in_parts = module.model.generate(prompt, synced_gpus=True, **length)
    held = sum(p.numel() for p in module.model.parameters())
    with module.sharing.full_params(module.model):
        at_once = module.model.generate(prompt, **length)
        logits = module.model(prompt).logits
    again = module.model(torch.tensor([[5, 6, 7]])).logits  # the engine's hooks are back
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    return {
        "same logits": torch.equal(logits, reloaded(prompt).logits),
        "same tokens": [
            torch.equal(found, reloaded.generate(prompt, **length)) for found in (in_parts, at_once)
        ],
        "length": in_parts.shape[1],
        "held": held,
        "whole": sum(p.numel() for p in reloaded.parameters()),
        "again": torch.equal(again, reloaded(torch.tensor([[5, 6, 7]])).logits),
    }


def _run_native(job: Job, *, resume: str | None = None) -> Record:
    set_seed(1)
    trainer, recorder, collator = make_theirs(job)
    trainer.train(resume_from_checkpoint=resume)
    return record_theirs(trainer, recorder, collator)


def _run_bridged(job: Job, *, resume: str | None = None) -> Record:
    set_seed(2)
    trainer, module, data, recorder, collator = make_ours(job)
    trainer.fit(module, data, ckpt_path=resume)
    return record_ours(trainer, module, recorder, collator)


def _rows(record: Record) -> list[dict[str, Any]]:
    """The rows of steps, without the order of their entries, which a file changes."""
    return [dict(sorted(row.items())) for row in record.log_history if "loss" in row]


def resume_both_ways(job: Job) -> dict[str, Any]:
    """Save on both engines in the middle, and go on from either's checkpoint on either."""
    connect()
    folders = {name: _shared_folder(name) for name in ("native", "bridged", "on")}
    native = _run_native(job.with_settings(output_dir=str(folders["native"])))
    bridged = _run_bridged(job.with_settings(output_dir=str(folders["bridged"])))
    same("weights", native.weights, bridged.weights)
    job = job.with_settings(output_dir=str(folders["on"]), save_strategy="no")
    found = {}
    for source in ("native", "bridged"):
        checkpoint = str(folders[source] / "checkpoint-3")
        for name, run in (("native", _run_native), ("bridged", _run_bridged)):
            went_on = run(job, resume=checkpoint)
            same(f"{source} to {name}", native.weights, went_on.weights)
            same(f"rows, {source} to {name}", _rows(native), _rows(went_on))
            found[f"{source} to {name}"] = len(went_on.steps) - 1
    names = {}
    for source in ("native", "bridged"):
        at = folders[source] / "checkpoint-3"
        names[source] = sorted(path.relative_to(at).as_posix() for path in at.rglob("*"))
    return {"steps": found, "names": names}


def load_best_on_both(config: dict[str, Any]) -> dict[str, Any]:
    """Train on both engines with the best weights loaded at the end, and see that these are the same."""
    connect()
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    job = Job("distilbert", {"deepspeed": config, "max_steps": 5, **evaluated, **best})
    theirs, ours = (
        run(job.with_settings(output_dir=str(_shared_folder(name))))
        for name, run in (("best-native", _run_native), ("best-bridged", _run_bridged))
    )
    same("rows", _rows(theirs), _rows(ours))
    same("weights", theirs.weights, ours.weights)
    named = {record.state["best_global_step"] for record in (theirs, ours)}
    return {"best": named, "last": theirs.state["global_step"]}


def bring_optimizer(config: dict[str, Any]) -> str:
    """Give HFModule an optimizer, which native drops without a word; returns the error."""
    connect()
    given = lambda model: (torch.optim.SGD(model.parameters(), lr=1e-2), None)  # noqa: E731
    try:
        _run_bridged(Job("distilbert", {"deepspeed": config}, eval_rows=0, optimizers=given))
    except hfbridge.ModelError as error:
        return str(error)
    return ""


def keep_files(config: dict[str, Any]) -> tuple[str, int]:
    """Give the trainer a ModelCheckpoint; returns the error, and the steps that were trained before it."""
    connect()
    job = Job("distilbert", {"deepspeed": config, "max_steps": 2}, eval_rows=0)
    trainer, module, data, *_ = make_ours(job)
    trainer.callbacks.append(ModelCheckpoint(dirpath="kept", every_n_train_steps=1))
    try:
        trainer.fit(module, data)
    except hfbridge.CheckpointError as error:
        return str(error), trainer.global_step
    return "", trainer.global_step


def resume_elsewhere(written: dict[str, Any], resumed: dict[str, Any]) -> str:
    """Write a checkpoint with some settings, and go on with others; returns the error."""
    connect()
    folder = _shared_folder("elsewhere")
    job = Job("distilbert", {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}, eval_rows=0)
    _run_bridged(job.with_settings(output_dir=str(folder), **written))
    try:
        _run_bridged(job.with_settings(**resumed, save_strategy="no"), resume=str(folder / "checkpoint-2"))
    except hfbridge.CheckpointError as error:
        return str(error)
    return ""


def count_engines() -> int:
    """Train, let go of Trainer and module, and count the engines that are left."""
    for _ in range(2):
        data = hfbridge.HFDataModule(train_dataset=make_rows("distilbert", 8), data_collator=PadRows())
        settings = {"output_dir": "out", "use_cpu": True, "max_steps": 1, "save_strategy": "no"}
        trainer = hfbridge.Trainer(settings, strategy="deepspeed_stage_2", enable_model_summary=False)
        trainer.fit(hfbridge.HFModule(make_model("distilbert")), data)
        del trainer, data
    for _ in range(3):
        gc.collect()
    return sum(isinstance(one, deepspeed.DeepSpeedEngine) for one in gc.get_objects())
