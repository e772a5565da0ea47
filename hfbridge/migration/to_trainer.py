"""HFModule, HFDataModule and settings -> `transformers.Trainer`.

here                                            transformers.Trainer
Settings                                        TrainingArguments, or Seq2SeqTrainingArguments
strategy="deepspeed_stage_2", ...               deepspeed={...}, if the settings do not say it
strategy="fsdp", "fsdp2"                        fsdp=True and the version in fsdp_config
a model, or a trained one                       model=
a model by its name, peft_config=               seeded, built, and passed as model=
a factory                                       model_init=
train_dataset, eval_dataset, map_function       the sets, mapped
data_collator, processing_class, compute_...,
optimizers, TrainerCallbacks                  arguments of the same names
loss_normalization="exact"                      no counterpart; a note says so
metrics=, packing=, Lightning callbacks and
loggers, replaced methods of HFModule         an error that names them
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from torch import nn
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    enable_full_determinism,
    set_seed,
)
from transformers import Trainer as NativeTrainer

from hfbridge.callbacks.attachment import RunSetup
from hfbridge.callbacks.trainer_state import CallbackHost
from hfbridge.data.columns import default_collator
from hfbridge.datamodule import HFDataModule
from hfbridge.errors import DataError, Problem, SettingsError, raise_problems
from hfbridge.settings import Settings
from hfbridge.settings.deepspeed_config import preset

# Callbacks that are hfbridge's own, or only show something.
_SHOWING = (CallbackHost, RunSetup, ModelSummary, ProgressBar)
# Arguments that only Lightning has, with their values without effect; others are settings.
_LIGHTNING_ALONE: Mapping[str, tuple[object, ...]] = {
    "detect_anomaly": (None, False),
    "limit_predict_batches": (None, 1.0),
    "logger": (None, False, []),
    "max_time": (None,),
    "min_epochs": (None, 1),
    "min_steps": (None, 0),
    "plugins": (None, []),
    "sync_batchnorm": (None, False),
}
_EXACT = (
    'loss_normalization="exact" is not supported by transformers.Trainer: as with "native", loss and '
    "gradient of models that ignore num_items_in_batch are larger, by the number of micro-batches of a step."
)


def make_native(
    module: Any, data: HFDataModule, source: Any = None, *, callbacks: Sequence[Any] = ()
) -> NativeTrainer:
    """Make the `transformers.Trainer` that trains the same: `module.to_native(data, trainer)`.

    Model, sets and callbacks are the same objects. The Trainer begins at step 0 with the present weights, or
    resumes by `train(resume_from_checkpoint=...)`.

    Args:
        module: the HFModule, whose method `to_native` this is.
        data: its data.
        source: settings, or the `hfbridge.Trainer` that has them and TrainerCallbacks; `None` takes the
            Trainer of the module's last run, or the settings of the module or the data.
        callbacks: further TrainerCallbacks.

    Returns:
        A Trainer; a Seq2SeqTrainer for `Seq2SeqTrainingArguments`.

    Raises:
        SettingsError: there are no settings, or something has no counterpart; all of it is named.
        DataError: the data is no HFDataModule.

    Mirrors: transformers.Trainer.__init__
    Proved by: tests/parity/test_migrate.py::test_there_and_back
    """
    if not isinstance(data, HFDataModule):
        raise DataError(f"to_native takes an HFDataModule, and was given a {type(data).__name__}.")
    trainer = source if isinstance(source, pl.Trainer) else None
    if source is None:
        trainer = module._trainer
    settings = _settings_of(module, data, trainer if source is None else source)
    problems = [*_without_counterpart(module, data), *([] if trainer is None else _of_lightning(trainer))]
    if problems:
        headline = f"transformers.Trainer does not support {len(problems)} of what is to be converted."
        raise_problems(SettingsError, headline, problems)
    if module.loss_normalization == "exact":
        module.info_once(_EXACT)
    args = settings.as_training_arguments(keeps_deepspeed=True)
    is_seq2seq = isinstance(args, Seq2SeqTrainingArguments)
    given = _given(module, data, args)
    hf_callbacks = [*getattr(trainer, "trainer_callbacks", ()), *callbacks]
    by_class = module.optimizer_cls_and_kwargs
    if is_seq2seq:
        native: NativeTrainer = Seq2SeqTrainer(args=args, callbacks=hf_callbacks, **given)
        native.optimizer_cls_and_kwargs = by_class  # which its __init__ does not take
    else:
        native = NativeTrainer(args=args, callbacks=hf_callbacks, optimizer_cls_and_kwargs=by_class, **given)
    if args.disable_tqdm and not getattr(trainer, "print_logs", True):
        native.remove_callback(PrinterCallback)
    return native


def _settings_of(module: Any, data: Any, source: Any) -> Settings:
    """Find the settings, with those of the strategy's name."""
    if source is None:
        source = module.given_settings or data.given_settings
    if source is None:
        raise SettingsError(
            "to_native needs settings, and neither the module nor the data has any. Pass them, or the "
            "hfbridge.Trainer: module.to_native(data, trainer)."
        )
    if not isinstance(source, pl.Trainer):
        return Settings.of(source)
    settings, plan = getattr(source, "settings", None), getattr(source, "plan", None)
    if settings is None or plan is None:
        found = module.given_settings or data.given_settings
        if found is None:
            raise SettingsError("This lightning.Trainer has no settings: module.to_native(data, settings).")
        return Settings.of(found)
    kind, options = plan.strategy.kind, plan.strategy.options
    if kind == "deepspeed" and not settings.deepspeed:
        zero = preset(options.get("stage", 2), offload=options.get("offload", False))
        return Settings.of(settings).replace(deepspeed=zero)
    if kind in ("fsdp", "fsdp2") and not settings.fsdp:
        config = {**(settings.fsdp_config or {}), "version": 1 if kind == "fsdp" else 2}
        return Settings.of(settings).replace(fsdp=True, fsdp_config=config)
    return Settings.of(settings)


def _without_counterpart(module: Any, data: Any) -> Iterator[Problem]:
    """Name what of module and data `transformers.Trainer` does not have."""
    if module.running_metrics is not None:
        yield Problem("HFModule(metrics=...)", "is of torchmetrics; pass compute_metrics=... instead")
    if data.packing is not None:
        text = "transformers.Trainer does not pack; pack the examples before, or leave it out"
        yield Problem(f"HFDataModule(packing={data.packing})", text)
    if module._run is not None and module.sharing.is_sharded:
        text = "the weights are sharded; save_pretrained writes them in full, for a new model"
        yield Problem(type(module.model).__name__, text)
    for given, kind in ((module, "HFModule"), (data, "HFDataModule")):
        for name, owner in _replaced(given, kind):
            yield Problem(
                f"{owner}.{name}", "is not called by transformers.Trainer; use its arguments or callbacks"
            )


def _replaced(given: Any, kind: str) -> Iterator[tuple[str, str]]:
    """Name the methods of hfbridge's class, or of Lightning's, that a subclass has replaced."""
    ancestors = type(given).__mro__
    ours = next(index for index, ancestor in enumerate(ancestors) if ancestor.__name__ == kind)
    for ancestor in ancestors[:ours]:
        for name, value in vars(ancestor).items():
            if callable(value) and not name.startswith("__") and hasattr(ancestors[ours], name):
                yield name, ancestor.__name__


def _of_lightning(trainer: pl.Trainer) -> Iterator[Problem]:
    """Name the callbacks and arguments of a Trainer that only Lightning has."""
    instead = "or pass the settings and TrainerCallbacks alone: module.to_native(data, settings, callbacks=)"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, _SHOWING):
            yield Problem(type(callback).__name__, f"is a callback of Lightning; leave it out, {instead}")
    plan = getattr(trainer, "plan", None)
    for name, value in ({} if plan is None else plan.trainer_arguments).items():
        if name in _LIGHTNING_ALONE and not any(value is s or value == s for s in _LIGHTNING_ALONE[name]):
            shown = f"Trainer({name}={value if isinstance(value, int | float | str) else '...'})"
            yield Problem(shown, f"is Lightning's alone; leave it out, {instead}")


def _given(module: Any, data: HFDataModule, args: Any) -> dict[str, Any]:
    """Collect the arguments of both Trainer and Seq2SeqTrainer."""
    processing_class = module.processing_class
    collator = data.data_collator
    if processing_class is None:
        processing_class = data.processing_class
    elif collator is None and data.processing_class not in (None, processing_class):
        collator = default_collator(data.processing_class)
    sets = {split.removeprefix("eval_"): _mapped(data, split) for split in data.eval_splits}
    model, model_init = _model_of(module, args)
    return {
        "model": model,
        "model_init": model_init,
        "processing_class": processing_class,
        "data_collator": collator,
        "train_dataset": _mapped(data, "train"),
        "eval_dataset": sets["eval"] if set(sets) == {"eval"} else sets or None,
        "compute_loss_func": module.compute_loss_func,
        "compute_metrics": module.compute_metrics,
        "preprocess_logits_for_metrics": module.preprocess_logits_for_metrics,
        "optimizers": module._user_optimizers,
    }


def _mapped(data: Any, split: str) -> Any:
    """Return a set with `map_function` applied; `None` if there is none."""
    if split in data._mapped or split not in data._raw:
        return data._mapped.get(split)
    raw = data._raw[split]
    return raw if data._mapper is None else data._mapper.map(raw, split)


def _model_of(module: Any, args: Any) -> tuple[nn.Module | None, Any]:
    """Return a model or a factory; a named model is built, seeded as for a run of hfbridge."""
    if module.is_built:
        return module.model, None
    build = module._build
    if not module._is_built["seeds_again"]:
        return None, lambda: build()
    seed_all = enable_full_determinism if args.full_determinism else set_seed
    seed_all(args.seed)
    return build(), None
