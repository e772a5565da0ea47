"""Train a job on each engine, recorded.

    engine       trains by                         losses from                    gradient norm from
    native       Trainer.train                     Trainer.training_step          Accelerator.clip_grad_norm_
    accelerate   AccelerateLoop                    the loop                       the loop
    lightning    from_trainer, hfbridge's fit      CallbackHost.add_micro_batch   HFModule.last_step

The Recorder is a TrainerCallback of all three. Only methods of the objects of this run are put into others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainer, TrainingArguments
from transformers import Trainer as NativeTrainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import DefaultFlowCallback

from hfbridge.compare import loop
from hfbridge.compare.digests import of_parameters
from hfbridge.compare.engines import Engine
from hfbridge.compare.job import Job, native_arguments
from hfbridge.compare.record import Recorder, described, measure
from hfbridge.distributed import collectives
from hfbridge.dropin.from_trainer import move
from hfbridge.errors import JobError
from hfbridge.settings import training_arguments as native_settings
from hfbridge.settings.deepspeed_config import preset
from hfbridge.strategies.sharing import Sharing
from hfbridge.utilities.imports import require

_SHOWING = (ProgressCallback, PrinterCallback, *INTEGRATION_TO_CALLBACK.values())
_NOT_SHOWN = ("output_dir", "logging_dir", "report_to", "disable_tqdm", "hub_token", "deepspeed")


def make_native(engine: Engine, built: NativeTrainer | Job) -> NativeTrainer:
    """Make the HF Trainer that an engine starts from, of what the job's script built."""
    deepspeed = None
    if engine.kind == "native" and engine.needs_deepspeed:
        require("deepspeed", extra="deepspeed", for_=engine.name)
        name = engine.strategy or ""
        deepspeed = preset(int(name.removeprefix("deepspeed_stage_")[0]), offload=name.endswith("offload"))
    if isinstance(built, Job):
        return built.make_trainer(deepspeed=deepspeed)
    return built if deepspeed is None else made_again(built, deepspeed=deepspeed)


def check_world_size(args: TrainingArguments, *, ranks: int) -> None:
    """Check that the HF Trainer splits its work among the ranks.

    Raises:
        JobError: each rank would train alone, on all samples, as on a machine without a GPU.
    """
    if args.world_size != ranks:
        raise JobError(
            f"The HF Trainer's world_size is {args.world_size}, on {ranks} ranks: each would train alone, on "
            "all samples. Without a GPU it splits the work with use_cpu=True only, and the job has "
            f"use_cpu={args.use_cpu!r}: set it."
        )


def made_again(trainer: NativeTrainer, *, deepspeed: Mapping[str, Any]) -> NativeTrainer:
    """Make an HF Trainer again, of the same parts, with DeepSpeed.

    Raises:
        JobError: its class is the job's own, or it brings an optimizer.
    """
    if type(trainer) not in (NativeTrainer, Seq2SeqTrainer) or trainer.optimizer is not None:
        raise JobError(
            f"build() returns a {type(trainer).__name__} that cannot be made again with DeepSpeed: it is a "
            "class of the script's own, or brings its optimizer. Set deepspeed in its arguments and compare "
            "native, or return an hfbridge.compare.Job."
        )
    defaults = (DefaultFlowCallback, *_SHOWING)
    given: dict[str, Any] = {
        "model": trainer.model if trainer.model_init is None else None,
        "model_init": trainer.model_init,
        "args": native_arguments(trainer.args, deepspeed=deepspeed),
        "data_collator": trainer.data_collator,
        "train_dataset": trainer.train_dataset,
        "eval_dataset": trainer.eval_dataset,
        "processing_class": trainer.processing_class,
        "compute_loss_func": trainer.compute_loss_func,
        "compute_metrics": trainer.compute_metrics,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "callbacks": [cb for cb in trainer.callback_handler.callbacks if not isinstance(cb, defaults)],
    }
    if type(trainer) is NativeTrainer:
        given["optimizer_cls_and_kwargs"] = trainer.optimizer_cls_and_kwargs
    return type(trainer)(**given)


def silence(trainer: NativeTrainer, folder: Path) -> None:
    """Let a run of a comparison write into a folder of its own, report nowhere and draw no bars.

    Args:
        trainer: not trained yet; this process is its only user.
        folder: for what it saves.
    """
    for kind in _SHOWING:
        trainer.remove_callback(kind)
    trainer.args.output_dir, trainer.args.report_to, trainer.args.push_to_hub = str(folder), [], False


def train(engine: Engine, trainer: NativeTrainer, recorder: Recorder) -> dict[str, Any]:
    """Train on one engine, to the end or to the recorder's last step.

    Args:
        engine: which.
        trainer: holds the job; made by `make_native`.
        recorder: not yet among its callbacks.

    Returns:
        The settings that it trained with, under "settings", and its notes, under "notes".

    Proved by: tests/compare/test_record.py, tests/compare/test_live.py
    """
    trainer.add_callback(recorder)
    if engine.kind == "lightning":
        return _train_lightning(engine, trainer, recorder)
    if engine.kind == "accelerate":
        notes = list(loop.NOTES)
        loop.AccelerateLoop(trainer, recorder).train()
    else:
        notes = []
        _record_native(trainer, recorder)
        trainer.train()
    settings = _settings_of(trainer.args, trainer.model, trainer.optimizer)
    return {"settings": {**settings, "strategy": _strategy_of(trainer)}, "notes": notes}


def _strategy_of(trainer: NativeTrainer) -> str:
    """Name the strategy of an HF Trainer by hfbridge's word for it."""
    if trainer.is_deepspeed_enabled:
        return "deepspeed"
    if trainer.is_fsdp_enabled:
        return "fsdp2" if trainer.accelerator.is_fsdp2 else "fsdp"
    return "ddp" if trainer.args.world_size > 1 else "single"


def _record_native(trainer: Any, recorder: Recorder) -> None:
    """Record an HF Trainer's micro-batches and gradient norms."""
    step, clip, norms = trainer.training_step, trainer.accelerator.clip_grad_norm_, [None]

    def training_step(model: nn.Module, inputs: Any, *counted: Any, **named: Any) -> Any:
        seen = described(inputs)  # before: labels may be taken out
        loss = step(model, inputs, *counted, **named)
        recorder.add_micro_batch(*seen, loss)
        return loss

    def clip_grad_norm(*given: Any, **named: Any) -> Any:
        norms[0] = clip(*given, **named)
        return norms[0]

    trainer.training_step = training_step
    trainer.accelerator.clip_grad_norm_ = clip_grad_norm
    recorder.grad_norm = lambda: norms[0]
    recorder.measure = _measure_in_parts


def _measure_in_parts(model: nn.Module) -> tuple[str, float] | None:
    """Digest the parameters of a model that ZeRO-3 may have sharded."""
    parts = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not parts:
        return measure(model)
    with require("deepspeed", extra="deepspeed", for_="ZeRO-3").zero.GatheredParameters(parts):
        return measure(model)


def _train_lightning(engine: Engine, native: NativeTrainer, recorder: Recorder) -> dict[str, Any]:
    trainer, module, data = move(
        native,
        loss_normalization=engine.normalization,
        hides_progress=True,  # the comparison shows it
        strategy=engine.strategy or "auto",
        logger=False,
        enable_model_summary=False,
    )

    def connect() -> None:
        host, add = module.host, module.host.add_micro_batch

        def add_micro_batch(loss: Any, inputs: Any) -> None:
            recorder.add_micro_batch(*described(inputs), loss)
            add(loss, inputs)

        host.add_micro_batch = add_micro_batch  # type: ignore[method-assign]

    recorder.connect = connect
    recorder.grad_norm = lambda: module.last_step.grad_norm
    recorder.measure = lambda model: _measure_shared(module.sharing, model)
    trainer.fit(module, data)
    settings = _settings_of(module.args, module.model, trainer.optimizers[0])
    settings |= {"loss_normalization": engine.normalization, "strategy": trainer.plan.strategy.kind}
    return {"settings": settings, "notes": list(dict.fromkeys([*trainer.plan.notes, *module.notes]))}


def _measure_shared(sharing: Sharing, model: nn.Module) -> tuple[str, float] | None:
    """Digest the parameters of a model that its strategy may have sharded."""
    if sharing.is_sharded and sharing.zero_config is None:
        weights = sharing.weights(model)
        return None if weights is None else of_parameters(_once(weights, model), is_first=True)
    with sharing.full_params(model):
        return measure(model)


def _once(weights: Mapping[str, torch.Tensor], model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a full `state_dict`; a tied one under its first name."""
    buffers, seen = {name for name, _ in model.named_buffers()}, set()
    for name, tensor in weights.items():
        if name not in buffers and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _settings_of(args: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    """Describe what an engine trained with: settings that were passed, and what was made of them."""
    given = {
        name: _plain(value) for name, value in native_settings.read(args).items() if name not in _NOT_SHOWN
    }
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), None)
    return {
        **given,
        "engine's optimizer": type(optimizer).__name__,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_grad_norm": args.max_grad_norm,
        "mixed precision": args.mixed_precision,
        "model": type(model).__name__,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "parameters' dtype": dtype,
        "device": str(args.device.type),
        "ranks": collectives.count(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value)


@contextmanager
def closing_group() -> Iterator[None]:
    """Close the process group in the end, or gloo aborts the process."""
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
