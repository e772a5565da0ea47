"""Settings and `lightning.Trainer` arguments together: what contradicts, and what Lightning is given.

A pure function of names and values; knows Lightning's argument names, and imports nothing of it.

    argument                   setting                          in Lightning
    max_epochs                 num_train_epochs                 rounded up; -1 where max_steps decides
    max_steps                  max_steps                        the same
    accumulate_grad_batches    gradient_accumulation_steps      1: a batch is a whole window
    gradient_clip_val          max_grad_norm                    None: HFModule clips
    precision                  bf16                             "32-true": HFModule casts
    log_every_n_steps          logging_steps                    as given
    default_root_dir           output_dir                       the same
    enable_progress_bar        disable_tqdm                     the opposite
    accelerator                use_cpu                          "cpu", else "auto"

An argument that says something which no setting says is taken over as the setting. Where both speak they
agree, or one error lists all contradictions.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hfbridge.errors import Problem, SettingsError, raise_problems
from hfbridge.settings.checks import suggest
from hfbridge.settings.fields import RULES, is_same, show
from hfbridge.settings.legacy import OLD_NAMES
from hfbridge.settings.plan import NEVER, Plan, Row
from hfbridge.settings.settings import Settings
from hfbridge.settings.strategies import Launched, StrategyChoice, check_ranks, choose_strategy
from hfbridge.settings.undecided import waiting

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
class _Twin:
    """A Lightning argument and the setting that says the same.

    Attributes:
        field: the setting.
        silent: argument values that say nothing.
        taken: the setting's value for the argument's.
        spoken: the argument's value for the setting's, to compare.
    """

    field: str
    silent: tuple[object, ...] = (None,)
    taken: Callable[[Any], Any] = lambda value: value
    spoken: Callable[[Any], Any] = lambda value: value


def _path(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str | os.PathLike) else value


_TWINS: Mapping[str, _Twin] = {
    # Lightning's -1 is no limit; _check_duration looks for the steps that end the run.
    "max_epochs": _Twin("num_train_epochs", silent=(None, -1), spoken=math.ceil),
    "max_steps": _Twin("max_steps", silent=(None, -1)),
    "accumulate_grad_batches": _Twin("gradient_accumulation_steps", silent=(None, 1)),
    "gradient_clip_val": _Twin("max_grad_norm"),
    "log_every_n_steps": _Twin("logging_steps"),
    "default_root_dir": _Twin("output_dir", taken=_path, spoken=_path),
    "enable_progress_bar": _Twin(
        "disable_tqdm", taken=lambda value: not value, spoken=lambda value: value is None or not value
    ),
}

_BY_SETTINGS = 'eval_strategy and eval_steps decide when to evaluate; use eval_strategy="epoch" or "steps"'
_SHORT_RUN = "it would change the epochs; use max_steps=... in the settings for a short run"

# argument -> the values that may be said, and why no others.
_FIXED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "num_sanity_val_steps": ((None, 0), "the native Trainer has no sanity check; use eval_on_start=True"),
    "use_distributed_sampler": ((False,), "hfbridge orders samples as the native Trainer does; leave it out"),
    "val_check_interval": ((None, 1.0), _BY_SETTINGS),
    "check_val_every_n_epoch": ((None, NEVER), _BY_SETTINGS),
    "inference_mode": ((False,), "the native Trainer evaluates under torch.no_grad; leave it out"),
    "gradient_clip_algorithm": ((None, "norm"), "gradients are clipped by their norm; leave it out"),
    "deterministic": ((None, False), "call transformers.enable_full_determinism(seed) in the script instead"),
    "limit_train_batches": ((None, 1.0), _SHORT_RUN),
    "limit_val_batches": ((None, 1.0), "metrics are those of the whole set; use a smaller eval_dataset"),
    "overfit_batches": ((0, 0.0), f"{_SHORT_RUN}, with a small train_dataset"),
    "fast_dev_run": ((False, 0), _SHORT_RUN),
    "reload_dataloaders_every_n_epochs": ((0,), "the loader lives as long as the run; leave it out"),
    "barebones": ((False,), "it removes the callbacks that hfbridge runs on; leave it out"),
}

_CONSUMED = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")
_ALWAYS: Mapping[str, object] = {
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "inference_mode": False,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "precision": "32-true",
    "check_val_every_n_epoch": NEVER,
}


def translate(
    settings: Settings,
    trainer_arguments: Mapping[str, Any],
    *,
    known_arguments: Collection[str] = LIGHTNING_ARGUMENTS,
    launched: Launched | None = None,
) -> Plan:
    """Decide what `lightning.Trainer` is given.

    Args:
        settings: what the user asked for by transformers' names.
        trainer_arguments: what the user asked for by Lightning's names; left alone.
        known_arguments: the names that the installed `lightning.Trainer` takes.
        launched: the processes that a launcher has started; `None` without one.

    Returns:
        The plan. The epochs and steps in it are an upper bound until the length of the data is known.

    Raises:
        SettingsError: with every argument that is unknown, not carried, or contradicts a setting.
    """
    problems: list[Problem] = []
    taken: dict[str, Any] = {}
    for name, value in trainer_arguments.items():
        if name not in known_arguments:
            problems.append(Problem(f"Trainer({name}=...)", _explain_unknown(name, value, known_arguments)))
        elif name in _TWINS:
            _compare(name, value, settings=settings, taken=taken, problems=problems)
        elif wrong := _find_wrong(name, value, settings=settings, taken=taken):
            problems.append(Problem(_spell(name, value), wrong))
    problems += _check_duration(settings, trainer_arguments)
    problems += _check_launched(trainer_arguments, launched)
    if taken:
        try:
            settings = settings.replace(**taken)
        except SettingsError as error:
            problems += error.problems
    choice, wrong_choice = _choose(settings, trainer_arguments, launched)
    problems += wrong_choice
    if problems:
        total = max(len(trainer_arguments), len(problems))
        noun = "argument" if total == 1 else "arguments"
        headline = f"{len(problems)} of {total} Trainer {noun} cannot be carried out; nothing was started."
        raise_problems(SettingsError, headline, problems)
    said = [f"{field}={value!r} was taken over from Trainer(...)" for field, value in taken.items()]
    final = _arguments(settings, trainer_arguments, choice, launched)
    undecided = waiting(settings, trainer_arguments)
    return Plan(
        settings=settings,
        trainer_arguments=MappingProxyType({name: final[name] for name in final if name not in undecided}),
        rows=tuple(_rows(settings)),
        notes=(*said, *settings.notes, *(choice.notes if "strategy" not in undecided else ())),
        strategy=choice,
        undecided=undecided,
    )


def _spell(name: str, value: object) -> str:
    """Write an argument as the user did."""
    return f"Trainer({show(name, value).replace(' = ', '=', 1)})"


def _both(field: str, value: object) -> str:
    """Say that a setting contradicts."""
    return f"{show(field, value).replace(' = ', '=', 1)} in the settings: set through both; choose one"


def _explain_unknown(name: str, value: object, known: Collection[str]) -> str:
    """Say what an argument is that Lightning does not have."""
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
    """Compare an argument with the setting that says the same, or take it over."""
    twin = _TWINS[name]
    if any(is_same(value, silent) for silent in twin.silent):
        return
    if name == "log_every_n_steps" and settings.logging_strategy != "steps":
        problems.append(Problem(_spell(name, value), _both("logging_strategy", settings.logging_strategy)))
    elif settings.given.get(twin.field) is None:
        taken[twin.field] = twin.taken(value)
    else:
        ours = getattr(settings, twin.field)
        if not is_same(twin.spoken(ours), twin.taken(value) if twin.taken is _path else value):
            problems.append(Problem(_spell(name, value), _both(twin.field, ours)))


def reason_against(name: str, value: Any) -> str:
    """Say why an argument of Lightning may not have a value that no setting can mean; empty if it may."""
    if name == "callbacks":
        return next(filter(None, map(_reason_against_callback, _listed(value))), "")
    if name not in _FIXED:
        return ""
    accepted, reason = _FIXED[name]
    # By type too: to Lightning, 1 is one batch and 1.0 all of them.
    is_accepted = any(type(value) is type(other) and value == other for other in accepted)
    return "" if is_accepted else f"refused: {reason}"


def _reason_against_callback(callback: object) -> str:
    if isinstance(callback, type) and _is_kind_of(callback, "Callback"):
        return f"{callback.__name__} is a class; give an object of it: {callback.__name__}(...)"
    if callback is not None and not _descends_from(callback, "Callback"):
        return f"{callback!r} is no callback: neither Lightning's nor a transformers.TrainerCallback"
    if _descends_from(callback, "GradientAccumulationScheduler"):
        return (
            "GradientAccumulationScheduler is refused: a step is one window of the same number of "
            "micro-batches; use gradient_accumulation_steps in the settings"
        )
    return ""


def _find_wrong(name: str, value: Any, *, settings: Settings, taken: dict[str, Any]) -> str:
    """Say what is wrong with an argument that has no setting of the same meaning, or empty text."""
    if name in _FIXED or name == "callbacks":
        return reason_against(name, value)
    if name == "precision":
        return _check_precision(value, settings)
    if name == "accelerator":
        return _check_accelerator(value, settings, taken)
    if name == "plugins" and any(_descends_from(plugin, "Precision") for plugin in _listed(value)):
        return "refused: HFModule casts around the model's forward itself; use bf16=True in the settings"
    return ""


def _check_precision(value: object, settings: Settings) -> str:
    """Compare `precision` with `bf16`."""
    if value is None:
        return ""
    if value in ("bf16-mixed", "bf16"):
        if settings.bf16:
            return ""
        if "bf16" in settings.given:
            return _both("bf16", False)
        return "refused: bf16 is not set; say bf16=True in the settings"
    if is_same(value, 32) or value in ("32", "32-true"):
        return _both("bf16", True) if settings.bf16 else ""
    return 'refused: only fp32 and bf16 are carried; use bf16=True in the settings, or "32-true"'


def _check_accelerator(value: object, settings: Settings, taken: dict[str, Any]) -> str:
    """Compare `accelerator` with `use_cpu`, or take "cpu" over."""
    if value is None or value == "auto":
        return ""
    is_cpu = value == "cpu" or _descends_from(value, "CPUAccelerator")
    if "use_cpu" not in settings.given:
        if is_cpu:
            taken["use_cpu"] = True
        return ""
    return "" if is_cpu == settings.use_cpu else _both("use_cpu", settings.use_cpu)


def _check_duration(settings: Settings, arguments: Mapping[str, Any]) -> Iterable[Problem]:
    """Refuse epochs beside steps: Lightning stops at the first limit, the native Trainer at the steps."""
    epochs, steps = arguments.get("max_epochs"), arguments.get("max_steps")
    if epochs is None:
        return
    if epochs == -1:
        if steps in (None, -1) and settings.max_steps <= 0:
            yield Problem(_spell("max_epochs", epochs), "would never end; use max_steps=... in the settings")
    elif steps not in (None, -1):
        yield Problem(_spell("max_epochs", epochs), f"max_steps={steps} also ends the run; choose one")
    elif settings.max_steps > 0:
        yield Problem(_spell("max_epochs", epochs), _both("max_steps", settings.max_steps))


def _check_launched(said: Mapping[str, Any], launched: Launched | None) -> Iterable[Problem]:
    """Compare how many ranks are asked for with how many a launcher has started."""
    if launched is None:
        return
    nodes = launched.world_size // launched.local_world_size
    started = (
        f"the launcher (torchrun, SLURM) has started WORLD_SIZE={launched.world_size} ranks, "
        f"{launched.local_world_size} on each of {nodes} nodes; leave it out, or start as many"
    )
    devices, asked = said.get("devices"), said.get("num_nodes")
    if _count_devices(devices) not in (None, launched.local_world_size):
        yield Problem(_spell("devices", devices), started)
    if asked not in (None, nodes):
        yield Problem(_spell("num_nodes", asked), started)


def _count_devices(value: Any) -> int | None:
    """How many devices `devices` names; `None` if it leaves that open."""
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


def _listed(value: Any) -> list[Any]:
    """Return an argument that may be one thing or several as a list."""
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
    """Whether there are several devices or ranks, as far as arguments and launcher tell."""
    if (said.get("num_nodes") or 1) != 1 or (launched is not None and launched.world_size > 1):
        return True
    return not _is_one_device(said.get("devices"))


def _arguments(
    settings: Settings, said: Mapping[str, Any], choice: StrategyChoice, launched: Launched | None
) -> dict[str, Any]:
    """Put together the arguments for `lightning.Trainer`; contradictions were refused before."""
    keeps = any(_descends_from(callback, "Checkpoint") for callback in _listed(said.get("callbacks")))
    is_single = choice.kind == "single" or _descends_from(said.get("strategy"), "SingleDeviceStrategy")
    final: dict[str, Any] = {
        "max_epochs": -1 if settings.max_steps > 0 else math.ceil(settings.num_train_epochs),
        "max_steps": settings.max_steps,
        "accelerator": "cpu" if settings.use_cpu else "auto",
        "devices": 1 if is_single else "auto",
        "logger": False,
        "enable_checkpointing": keeps,
        "enable_progress_bar": not settings.disable_tqdm,
        **_ALWAYS,
    }
    if settings.logging_strategy == "steps" and settings.logging_steps >= 1:
        final["log_every_n_steps"] = int(settings.logging_steps)
    if settings.output_dir is not None:
        final["default_root_dir"] = os.path.expanduser(settings.output_dir)
    if launched is not None:
        final["devices"] = launched.local_world_size
        final["num_nodes"] = launched.world_size // launched.local_world_size
    decided = {*_ALWAYS, *_CONSUMED, "max_epochs", "max_steps", "default_root_dir", "enable_progress_bar"}
    for name, value in said.items():
        is_unset = name in ("devices", "accelerator") and value == "auto"
        is_unset |= value is None and (name in final or name == "strategy")
        if name not in decided and not is_unset:
            final[name] = value
    return final


def _rows(settings: Settings) -> Iterable[Row]:
    """One row per setting given, in the order of the rules, and for a default that has a note."""
    for name, rule in RULES.items():
        notes = settings.notes_on(name)
        if name in settings.given or notes:
            yield Row(name, getattr(settings, name), rule.home, "; ".join(notes))
