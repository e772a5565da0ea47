"""`transformers.Trainer` object -> hfbridge's Trainer, HFModule and HFDataModule.

done by transformers.Trainer.__init__             here
the model moved to args.device                    Lightning moves it
model.config.use_cache, model.generation_config   set again, from the same settings
accelerate's autocast around the forward          removed; HFModule has its own
num_steps=1 put into accelerator_config           removed
callbacks made of report_to and disable_tqdm      left out; the host makes its own
on_init_end fired                                 not fired again for the same objects
random states seeded                              seeded again before the first run
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType, MethodType
from typing import Any, Literal

from transformers import Seq2SeqTrainer
from transformers import Trainer as NativeTrainer

from hfbridge.datamodule import HFDataModule
from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.migration.trainer_attributes import changed_settings, has_trained
from hfbridge.migration.trainer_callbacks import SortedCallbacks, sort_callbacks
from hfbridge.module import HFModule
from hfbridge.settings import Settings, training_arguments
from hfbridge.settings.rules import DEFAULTS, SEQ2SEQ_FIELDS
from hfbridge.trainer import Trainer


def convert_trainer(
    native_trainer: NativeTrainer,
    *,
    refused: Iterable[Problem],
    loss_normalization: Literal["exact", "native"],
    changed: Mapping[str, Any] = MappingProxyType({}),
    module_class: type[HFModule] = HFModule,
    make_data: Callable[..., HFDataModule] = HFDataModule,
    drops_unread: bool = False,
    **trainer_arguments: Any,
) -> tuple[Trainer, HFModule, HFDataModule]:
    """Make Trainer, module and data of a `transformers.Trainer`.

    Args:
        native_trainer: the object.
        refused: what is unsupported of it, without callbacks and settings.
        loss_normalization: of HFModule.
        changed: settings that replace the object's.
        module_class: of the module.
        make_data: makes the data module of arguments that HFDataModule takes.
        drops_unread: leave out settings that nothing reads, in place of an error.
        **trainer_arguments: of `hfbridge.Trainer`.

    Raises:
        SettingsError: something is not supported on Lightning; all of it is named.
    """
    found = sort_callbacks(native_trainer)
    problems = [*refused, *found.problems]
    settings, notes = _settings_of(
        native_trainer, found, problems, changed=changed, drops_unread=drops_unread
    )
    if problems:
        noun, verb = ("part", "is") if len(problems) == 1 else ("parts", "are")
        what = f"{len(problems)} {noun} of this {type(native_trainer).__name__} {verb} not supported"
        raise_problems(SettingsError, f"{what} on Lightning; nothing was started.", problems)
    given = trainer_arguments.pop("callbacks", None) or []
    callbacks = [*found.users, *(given if isinstance(given, list | tuple) else [given])]
    trainer = Trainer(settings, callbacks=callbacks, **trainer_arguments)
    trainer.initialized_callbacks = tuple(found.users)
    trainer.print_logs = found.print_logs
    trainer.train_batch_size = _train_batch_size(native_trainer)
    module = _module_of(native_trainer, loss_normalization, module_class)
    data = _data_of(native_trainer, make_data)
    module.evaluator.keep_padded_samples = isinstance(native_trainer, Seq2SeqTrainer)
    if not drops_unread:  # else callbacks get the arguments of the user's object
        for note in notes:
            module.info_once(note)
    if has_trained(native_trainer):
        module.evaluator.follow(trainer, skip_memory_metrics=settings.skip_memory_metrics)
    return trainer, module, data


def _settings_of(
    native_trainer: NativeTrainer,
    callbacks: SortedCallbacks,
    problems: list[Problem],
    *,
    changed: Mapping[str, Any],
    drops_unread: bool,
) -> tuple[Settings, list[str]]:
    """Read the settings, with what was changed on the object, and add their problems to `problems`."""
    values, notes = read_values(native_trainer, callbacks)
    try:
        return Settings.of({**values, **changed}, drops_unread=drops_unread), notes
    except SettingsError as error:
        problems += error.problems or [Problem("args", str(error))]
        return Settings(), notes


def read_values(native_trainer: Any, callbacks: SortedCallbacks) -> tuple[dict[str, Any], list[str]]:
    """Read the settings of a `transformers.Trainer` by name, with notes on what is left out."""
    args, notes = native_trainer.args, list[str]()
    values = training_arguments.read(args)
    for name in [field.name for field in fields(args) if field.name in values and field.name not in DEFAULTS]:
        del values[name]
        notes.append(
            f"{name} is a field of {type(args).__name__} that transformers.TrainingArguments does not "
            "have; neither Trainer reads it, and the arguments that callbacks get are without it."
        )
    if not isinstance(native_trainer, Seq2SeqTrainer):  # which alone reads them
        values = {name: value for name, value in values.items() if name not in SEQ2SEQ_FIELDS}
    values.pop("resume_from_checkpoint", None)
    values |= {**changed_settings(native_trainer), **callbacks.settings}
    _take_out_steps(values)
    return values, notes


def _take_out_steps(values: dict[str, Any]) -> None:
    """Undo what the Trainer has written into `accelerator_config`.

    Mirrors: transformers.Trainer.create_accelerator_and_postprocess
    """
    config: Any = values.get("accelerator_config")
    given = config.get("gradient_accumulation_kwargs") if isinstance(config, dict) else None
    if given and given.get("num_steps") == 1:
        kept = {name: value for name, value in given.items() if name != "num_steps"}
        values["accelerator_config"] = {**config, "gradient_accumulation_kwargs": kept or None}


def _module_of(
    native_trainer: Any, loss_normalization: Literal["exact", "native"], module_class: type[HFModule]
) -> HFModule:
    model_init, optimizer = native_trainer.model_init, native_trainer.optimizer
    schedule = None if native_trainer._created_lr_scheduler else native_trainer.lr_scheduler
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's, the one within
    if model_init is not None:  # `train` makes the model again, and optimizer and schedule with it
        optimizer = schedule = None
    else:
        _take_wrapper_off(native_trainer.model)
    return module_class(
        native_trainer.model if model_init is None else model_init,
        processing_class=native_trainer.processing_class,
        compute_metrics=native_trainer.compute_metrics,
        preprocess_logits_for_metrics=native_trainer.preprocess_logits_for_metrics,
        compute_loss_func=native_trainer.compute_loss_func,
        optimizers=(optimizer, schedule),
        optimizer_cls_and_kwargs=native_trainer.optimizer_cls_and_kwargs if optimizer is None else None,
        loss_normalization=loss_normalization,
    )


def _take_wrapper_off(model: Any) -> None:
    """Restore a model's forward, which accelerate has put under autocast in `train` or `evaluate`.

    `Accelerator.unwrap_model` would remove transformers' own decorators, too.

    Mirrors: accelerate.Accelerator.prepare_model
    """
    if vars(model).pop("_original_forward", None) is None:
        return
    forward = vars(model).pop("forward")
    vars(model).pop("_is_accelerate_prepared", None)  # or a transformers.Trainer would not restore autocast
    is_method = isinstance(forward, MethodType)
    while _home_of(forward := getattr(forward, "__func__", forward)) in ("accelerate", "torch"):
        forward = forward.__wrapped__
    if forward is not type(model).forward:  # one that the user had set on the object
        model.forward = MethodType(forward, model) if is_method else forward


def _home_of(function: Any) -> str:
    """Name the package that a function or callable object comes from."""
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return str(module).partition(".")[0]


def _data_of(native_trainer: Any, make_data: Callable[..., HFDataModule]) -> HFDataModule:
    return make_data(
        train_dataset=native_trainer.train_dataset,
        eval_dataset=native_trainer.eval_dataset,
        processing_class=native_trainer.processing_class,
        data_collator=native_trainer.data_collator,
    )


def _train_batch_size(native_trainer: Any) -> int:
    """Micro-batch size of one device, which `auto_find_batch_size` may have reduced."""
    size: int = native_trainer._train_batch_size // max(1, native_trainer.args.n_gpu)
    return size
