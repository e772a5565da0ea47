"""Merge settings and `lightning.Trainer` arguments into the arguments for Lightning.

    argument                   setting                          in Lightning
    max_epochs                 num_train_epochs                 rounded up; -1 where max_steps decides
    max_steps                  max_steps                        the same
    accumulate_grad_batches    gradient_accumulation_steps      the same
    gradient_clip_val          max_grad_norm                    the same; None for 0
    precision "bf16-mixed"     bf16                             "32-true": HFModule casts
    log_every_n_steps          logging_steps                    the same; 0 is logging_strategy="no"
    default_root_dir           output_dir                       the same
    enable_progress_bar        disable_tqdm                     the opposite
    accelerator                use_cpu                          "cpu", else "auto"

An argument has Lightning's meaning, a setting transformers'. An argument becomes the setting if the setting
was not passed, or has its default value, which says nothing; otherwise both must agree, or one error lists
all conflicts. max_epochs=0 and max_steps=0, which no setting can be, train nothing. What neither sets has
transformers' default where there are settings, and Lightning's where there are none:

    argument                                  with settings                     without any
    logger, enable_checkpointing              none                              Lightning's
    num_sanity_val_steps                      0                                 2
    val_check_interval,
      check_val_every_n_epoch                 eval_strategy decides             after each epoch
    max_epochs                                num_train_epochs=3                Lightning's
    gradient_clip_val                         max_grad_norm=1.0                 None
    log_every_n_steps                         logging_steps=500                 50
    inference_mode                            False                             False
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hfbridge.errors import Problem, SettingsError, raise_problems, suggest
from hfbridge.settings.legacy_names import OLD_NAMES
from hfbridge.settings.plan import NEVER, Plan, Row
from hfbridge.settings.rules import DEFAULTS, RULES, is_same, show
from hfbridge.settings.settings import Settings
from hfbridge.settings.strategy_choice import Launched, StrategyChoice, check_ranks, choose_strategy

LIGHTNING_ARGUMENTS = (
    "accelerator",
    "accumulate_grad_batches",
    "barebones",
    "benchmark",
    "callbacks",
    "check_val_every_n_epoch",
    "default_root_dir",
    "detect_anomaly",
    "deterministic",
    "devices",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "inference_mode",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "log_every_n_steps",
    "logger",
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "model_registry",
    "num_nodes",
    "num_sanity_val_steps",
    "overfit_batches",
    "plugins",
    "precision",
    "profiler",
    "reload_dataloaders_every_n_epochs",
    "strategy",
    "sync_batchnorm",
    "use_distributed_sampler",
    "val_check_interval",
)
"""The arguments of `lightning.Trainer`."""


@dataclass(frozen=True, slots=True)
class _Equivalent:
    """A Lightning argument and the setting that means the same.

    Attributes:
        field: the setting.
        unset: argument values that mean "not set".
        to_setting: the setting's value for the argument's.
        from_setting: the argument's value for the setting's, to compare.
    """

    field: str
    unset: tuple[object, ...] = (None,)
    to_setting: Callable[[Any], Any] = lambda value: value
    from_setting: Callable[[Any], Any] = lambda value: value


def _path(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | os.PathLike) else value


_EQUIVALENTS: Mapping[str, _Equivalent] = {
    "max_epochs": _Equivalent("num_train_epochs", unset=(None, -1), from_setting=math.ceil),
    "max_steps": _Equivalent("max_steps", unset=(None, -1)),
    "accumulate_grad_batches": _Equivalent("gradient_accumulation_steps", unset=(None, 1)),
    "gradient_clip_val": _Equivalent("max_grad_norm"),
    "log_every_n_steps": _Equivalent("logging_steps"),
    "default_root_dir": _Equivalent("output_dir", to_setting=_path, from_setting=_path),
    "enable_progress_bar": _Equivalent(
        "disable_tqdm",
        to_setting=lambda value: not value,
        from_setting=lambda value: value is None or not value,
    ),
}

# Arguments for Lightning where neither an argument nor a setting says anything else.
_BESIDE_SETTINGS: Mapping[str, object] = {
    "logger": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": NEVER,
}
# What fast_dev_run sets itself, as in Lightning.
_REPLACED_BY_DEV_RUN = ("max_epochs", "max_steps")
# What conflicts with barebones=True in Lightning.
_NOT_BAREBONES = (
    "logger",
    "enable_checkpointing",
    "enable_progress_bar",
    "log_every_n_steps",
    "num_sanity_val_steps",
)
_LIGHTNING_LOGS_EVERY, _LIGHTNING_EPOCHS = 50, 1000
_BF16 = ("bf16-mixed", "bf16")
ENDLESS_EPOCHS = 2**40
"""Epochs of a run that neither epochs nor steps end."""
_VALIDATION = ("val_check_interval", "check_val_every_n_epoch")


def translate(
    settings: Settings | None,
    trainer_arguments: Mapping[str, Any],
    *,
    known_arguments: Collection[str] = LIGHTNING_ARGUMENTS,
    launched: Launched | None = None,
) -> Plan:
    """Choose the arguments for `lightning.Trainer`.

    Args:
        settings: `None` for Lightning's defaults.
        trainer_arguments: of `lightning.Trainer`; not modified.
        known_arguments: the arguments of the installed `lightning.Trainer`.
        launched: the processes that a launcher has started; `None` without one.

    Returns:
        The plan. The epochs and steps in it are an upper bound until the length of the data is known.

    Raises:
        SettingsError: with every argument that is unknown or conflicts with a setting.
    """
    has_settings = settings is not None
    settings = Settings() if settings is None else settings
    problems: list[Problem] = []
    taken: dict[str, Any] = {}
    is_brief = bool(trainer_arguments.get("fast_dev_run"))
    for name, value in trainer_arguments.items():
        if name not in known_arguments:
            problems.append(Problem(f"Trainer({name}=...)", _explain_unknown(name, value, known_arguments)))
        elif name in _EQUIVALENTS and not (is_brief and name in _REPLACED_BY_DEV_RUN):
            _compare(name, value, settings=settings, taken=taken, problems=problems)
        elif wrong := _find_wrong(name, value, settings=settings, taken=taken):
            problems.append(Problem(_spell(name, value), wrong))
    validates = not has_settings or is_brief or _sets_validation(trainer_arguments)
    problems += _check_validation(settings, trainer_arguments)
    problems += _check_launched(trainer_arguments, launched)
    changes = {} if has_settings else _lightning_defaults(taken, trainer_arguments)
    changes |= _limits(settings, trainer_arguments)
    if taken or changes:
        try:
            settings = settings.replace(**{**taken, **changes})
        except SettingsError as error:
            problems += error.problems
    choice, wrong_choice = _choose(settings, trainer_arguments, launched)
    problems += wrong_choice
    if problems:
        total = max(len(trainer_arguments), len(problems))
        noun = "argument" if total == 1 else "arguments"
        headline = f"{len(problems)} of {total} Trainer {noun} cannot be used; nothing was started."
        raise_problems(SettingsError, headline, problems)
    said = [f"{field}={value!r} was taken over from Trainer(...)" for field, value in taken.items()]
    final = _arguments(settings, trainer_arguments, choice, launched)
    if not has_settings:
        final = {name: value for name, value in final.items() if not _is_lightnings(name, trainer_arguments)}
    elif validates:
        del final["check_val_every_n_epoch"]
    if validates:  # None is a value of check_val_every_n_epoch
        final |= {name: trainer_arguments[name] for name in _VALIDATION if name in trainer_arguments}
    return Plan(
        settings=settings,
        trainer_arguments=MappingProxyType(final),
        rows=tuple(_rows(settings)),
        notes=(*said, *settings.notes, *choice.notes),
        strategy=choice,
        has_settings=has_settings,
        validates=validates,
        passed=MappingProxyType(dict(trainer_arguments)),
    )


def fast_dev_run_settings(steps: int) -> dict[str, Any]:
    """Return the settings of a run that Lightning's `fast_dev_run` cuts to some batches: nothing is kept.

    Args:
        steps: batches to train on, and to validate on afterwards.
    """
    return {
        "max_steps": steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
    }


def _lightning_defaults(taken: Mapping[str, Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that stand for Lightning's defaults, where no argument says anything else."""
    found: dict[str, Any] = {"save_strategy": "no", "report_to": "none"}
    if passed.get("barebones"):
        found["logging_strategy"] = "no"
    elif not {"logging_steps", "logging_strategy"} & taken.keys():
        found["logging_steps"] = _LIGHTNING_LOGS_EVERY
    if "max_grad_norm" not in taken:
        found["max_grad_norm"] = 0.0
    if not {"max_steps", "num_train_epochs"} & taken.keys():
        found["num_train_epochs"] = float(_LIGHTNING_EPOCHS)
    return found


def _is_lightnings(name: str, passed: Mapping[str, Any]) -> bool:
    """Whether an argument is left to Lightning's default where there are no settings."""
    left = (*_BESIDE_SETTINGS, "enable_checkpointing", "max_epochs", "max_steps", "log_every_n_steps")
    return name in left and passed.get(name) is None


def _limits(settings: Settings, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that stand for `fast_dev_run`, or for Lightning's -1 where nothing ends the run."""
    if steps := int(passed.get("fast_dev_run") or 0):
        return fast_dev_run_settings(steps)
    has_steps = settings.max_steps > 0 or passed.get("max_steps", -1) not in (None, -1)
    if passed.get("max_epochs") == -1 and not has_steps and is_unset(settings, "num_train_epochs"):
        return {"num_train_epochs": float(ENDLESS_EPOCHS)}
    return {}


def _sets_validation(passed: Mapping[str, Any]) -> bool:
    """Whether arguments of the Trainer set when to validate."""
    return any(passed.get(name) not in (None, NEVER) for name in _VALIDATION)


def is_unset(settings: Settings, field: str) -> bool:
    """Whether a setting was not passed, or has its default value, which says nothing."""
    given = settings.given
    return field not in given or given[field] is None or is_same(given[field], DEFAULTS[field])


def _check_validation(settings: Settings, passed: Mapping[str, Any]) -> Iterable[Problem]:
    """Compare the arguments that set when to validate with `eval_strategy`."""
    if is_unset(settings, "eval_strategy") or not _sets_validation(passed) or passed.get("fast_dev_run"):
        return
    for name in _VALIDATION:
        if passed.get(name) not in (None, NEVER):
            yield Problem(
                _spell(name, passed[name]), _conflict(name, passed[name], "eval_strategy", settings)
            )


def _spell(name: str, value: object) -> str:
    return f"Trainer({show(name, value).replace(' = ', '=', 1)})"


def _conflict(name: str, value: object, field: str, settings: Settings) -> str:
    """Describe an argument and a setting that have different values."""
    argument, setting = (
        show(n, v).replace(" = ", "=", 1) for n, v in ((name, value), (field, getattr(settings, field)))
    )
    return f"`{argument}` conflicts with `{setting}` in the settings; set only one"


def _explain_unknown(name: str, value: object, known: Collection[str]) -> str:
    """Describe an argument that Lightning does not have."""
    if name in RULES or name in OLD_NAMES:
        return f"this is a setting: pass it to Settings({name}=...)"
    close = suggest(name, (*known, *RULES))
    for field in RULES:
        if close == f"; did you mean {field}?" and field not in known:
            return f"unknown; did you mean Settings({field}=...)?"
    return f"unknown{close}" if close else "unknown; neither lightning.Trainer nor Settings has it"


def _compare(
    name: str, value: Any, *, settings: Settings, taken: dict[str, Any], problems: list[Problem]
) -> None:
    """Compare an argument with the setting that means the same, or take it over."""
    equivalent = _EQUIVALENTS[name]
    if any(is_same(value, unset) for unset in equivalent.unset):
        return
    field = equivalent.field
    ours = equivalent.from_setting(getattr(settings, field))
    is_equal = field in settings.given and is_same(ours, _path(value))
    if name == "log_every_n_steps" and not is_unset(settings, "logging_strategy"):
        if settings.logging_strategy != "no" or value != 0:
            text = _conflict(name, value, "logging_strategy", settings)
            problems.append(Problem(_spell(name, value), text))
    elif is_equal:
        return
    elif not is_unset(settings, field):
        problems.append(Problem(_spell(name, value), _conflict(name, value, field, settings)))
    elif is_same(value, 0) and name == "log_every_n_steps":
        taken["logging_strategy"] = "no"
    elif not (is_same(value, 0) and name in ("max_epochs", "max_steps")):
        taken[field] = equivalent.to_setting(value)


def _reason_against_callback(callback: object) -> str:
    if isinstance(callback, type) and _is_kind_of(callback, "Callback"):
        return f"{callback.__name__} is a class; pass an object of it: {callback.__name__}(...)"
    if callback is not None and not _descends_from(callback, "Callback"):
        return f"{callback!r} is no callback: neither Lightning's nor a transformers.TrainerCallback"
    return ""


def _find_wrong(name: str, value: Any, *, settings: Settings, taken: dict[str, Any]) -> str:
    """Return what is wrong with an argument that needs more than a comparison of values, or empty text."""
    if name == "callbacks":
        return next(filter(None, map(_reason_against_callback, _as_list(value))), "")
    if name == "precision":
        return _check_precision(value, settings, taken)
    if name == "plugins":
        return _check_plugins(value, settings)
    if name == "accelerator":
        return _check_accelerator(value, settings, taken)
    return ""


def _check_precision(value: object, settings: Settings, taken: dict[str, Any]) -> str:
    """Compare `precision` with `bf16`, or take "bf16-mixed" over."""
    is_mixed = value in _BF16
    if value is None or is_mixed == settings.bf16:
        return ""
    if not is_mixed:
        return _conflict("precision", value, "bf16", settings)
    taken["bf16"] = True
    return ""


def _check_plugins(value: object, settings: Settings) -> str:
    """Compare a precision plugin with `bf16`."""
    for plugin in _precision_plugins(value):
        if settings.bf16 and getattr(plugin, "precision", None) not in _BF16:
            name = type(plugin).__name__
            return f"`plugins=[{name}(...)]` conflicts with `bf16=True` in the settings; set only one"
    return ""


def _precision_plugins(value: object) -> list[Any]:
    return [plugin for plugin in _as_list(value) if _descends_from(plugin, "Precision")]


def _check_accelerator(value: object, settings: Settings, taken: dict[str, Any]) -> str:
    """Compare `accelerator` with `use_cpu`, or take "cpu" over."""
    if value is None or value == "auto":
        return ""
    is_cpu = value == "cpu" or _descends_from(value, "CPUAccelerator")
    if is_cpu == settings.use_cpu:
        return ""
    if not is_cpu:
        return _conflict("accelerator", value, "use_cpu", settings)
    taken["use_cpu"] = True
    return ""


def _check_launched(said: Mapping[str, Any], launched: Launched | None) -> Iterable[Problem]:
    """Compare the number of ranks in the arguments with the number that a launcher has started."""
    if launched is None:
        return
    nodes = launched.world_size // launched.local_world_size
    started = (
        f"the launcher (torchrun, SLURM) has started WORLD_SIZE={launched.world_size} ranks, "
        f"{launched.local_world_size} on each of {nodes} nodes; leave it out, or start as many"
    )
    devices, wanted = said.get("devices"), said.get("num_nodes")
    if _count_devices(devices) not in (None, launched.local_world_size):
        yield Problem(_spell("devices", devices), started)
    if wanted not in (None, nodes):
        yield Problem(_spell("num_nodes", wanted), started)


def _count_devices(value: Any) -> int | None:
    """Count the devices that `devices` names; `None` if it leaves that open."""
    if isinstance(value, list | tuple):
        return len(value)
    if isinstance(value, str) and "," in value:
        return len([part for part in value.split(",") if part.strip()])
    try:
        return count if (count := int(value)) >= 0 else None
    except (TypeError, ValueError):
        return None


def _is_one_device(value: Any) -> bool:
    """Whether `devices` names exactly one device, or leaves the choice."""
    if isinstance(value, str):
        listed = [part for part in value.split(",") if part.strip()]
        return value in ("auto", "1") or ("," in value and len(listed) == 1 and listed[0].strip() != "-1")
    if isinstance(value, list | tuple):
        return len(value) == 1
    return value is None or is_same(value, 1)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _descends_from(value: object, class_name: str) -> bool:
    """Whether an object has a class of this name among its ancestors; Lightning is not imported here."""
    return _is_kind_of(type(value), class_name)


def _is_kind_of(kind: type, class_name: str) -> bool:
    return any(ancestor.__name__ == class_name for ancestor in kind.__mro__)


def _choose(
    settings: Settings, said: Mapping[str, Any], launched: Launched | None
) -> tuple[StrategyChoice, list[Problem]]:
    """Choose the strategy, and find what of the settings does not fit several ranks."""
    strategy, has_several = said.get("strategy"), _has_several(said, launched)
    try:
        choice = choose_strategy(settings, strategy, has_several=has_several)
    except SettingsError as error:
        return StrategyChoice("single"), list(error.problems)
    except ValueError as error:
        return StrategyChoice("single"), [Problem(_spell("strategy", strategy), str(error))]
    if not has_several:
        return choice, []
    return choice, [
        Problem(show(name, getattr(settings, name)), text) for name, text in check_ranks(settings)
    ]


def _has_several(said: Mapping[str, Any], launched: Launched | None) -> bool:
    """Whether there are several devices or ranks, as far as arguments and launcher say."""
    if (said.get("num_nodes") or 1) != 1 or (launched is not None and launched.world_size > 1):
        return True
    return not _is_one_device(said.get("devices"))


def _arguments(
    settings: Settings, said: Mapping[str, Any], choice: StrategyChoice, launched: Launched | None
) -> dict[str, Any]:
    """Return the arguments for `lightning.Trainer`; conflicts have raised before."""
    keeps = any(_descends_from(callback, "Checkpoint") for callback in _as_list(said.get("callbacks")))
    is_single = choice.kind == "single" or _descends_from(said.get("strategy"), "SingleDeviceStrategy")
    final: dict[str, Any] = {
        "max_epochs": -1 if settings.max_steps > 0 else math.ceil(settings.num_train_epochs),
        "max_steps": settings.max_steps,
        "accelerator": "cpu" if settings.use_cpu else "auto",
        "devices": 1 if is_single else "auto",
        **_BESIDE_SETTINGS,
        "enable_checkpointing": keeps,
        "enable_progress_bar": not settings.disable_tqdm,
        "inference_mode": False,
        "accumulate_grad_batches": settings.gradient_accumulation_steps,
        "gradient_clip_val": settings.max_grad_norm or None,
        "precision": "32-true",
    }
    if said.get("barebones"):
        final = {name: value for name, value in final.items() if name not in _NOT_BAREBONES}
    if _precision_plugins(said.get("plugins")):
        del final["precision"]
    if settings.logging_strategy == "steps" and settings.logging_steps >= 1 and not said.get("barebones"):
        final["log_every_n_steps"] = int(settings.logging_steps)
    if settings.output_dir is not None:
        final["default_root_dir"] = os.path.expanduser(settings.output_dir)
    if launched is not None:
        final["devices"] = launched.local_world_size
        final["num_nodes"] = launched.world_size // launched.local_world_size
    for name, value in said.items():
        is_unset = name in ("devices", "accelerator") and value == "auto"
        is_unset |= value is None and (name in final or name in ("strategy", *_VALIDATION))
        is_unset |= name == "precision" and value in _BF16
        is_unset |= name in ("max_epochs", "max_steps") and value == -1
        is_unset |= name in ("default_root_dir", "enable_progress_bar", "accumulate_grad_batches")
        if not is_unset or (name == "enable_progress_bar" and said.get("barebones")):
            final[name] = value
    if final["max_epochs"] == ENDLESS_EPOCHS:
        final["max_epochs"] = -1
    return final


def _rows(settings: Settings) -> Iterable[Row]:
    """Make one row per setting that was passed, in the order of the rules, and per default with a note."""
    for name, rule in RULES.items():
        notes = settings.notes_on(name)
        if name in settings.given or notes:
            yield Row(name, getattr(settings, name), rule.used_by, "; ".join(notes))
