"""explain: what settings become, what differs from the HF Trainer, what is unsupported; nothing is loaded."""

import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from transformers import TrainingArguments

from hfbridge.errors import MissingDependencyError, Problem, SettingsError, describe_problems
from hfbridge.settings import UNDECIDED, Plan, Row, Settings, SettingsSource, require_packages, translate
from hfbridge.settings.accelerate_config import read_accelerate_config
from hfbridge.settings.io import read_file
from hfbridge.settings.plan import NEVER
from hfbridge.settings.rules import is_same
from hfbridge.settings.schedulers import FOLLOWING

_OWN_MEAN = "BERT, RoBERTa, DistilBERT and DeBERTa with most heads, T5, BART, Marian, Whisper, Segformer"
_DIVIDING = "Llama, Qwen, Mistral, ViT"
_WIDTH = 100

Normalization = Literal["exact", "native"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something about the HF Trainer that its settings do not show.

    Attributes:
        about: the settings it comes from.
        text: what the HF Trainer does, in numbers, and what hfbridge does.
        is_alike: whether hfbridge does the same.
    """

    about: tuple[str, ...]
    text: str
    is_alike: bool


def differences(
    settings: Settings, *, ranks: int | None, kind: str | None, normalization: Normalization
) -> list[Difference]:
    """List what the HF Trainer does that its settings do not show.

    Args:
        settings: of the run.
        ranks: how many there are; `None` if only the machine knows.
        kind: of the strategy; `None` if it is made when the run begins.
        normalization: the `loss_normalization` of the HFModule.

    Returns:
        First what differs, then what is alike.
    """
    found = list(_loss_differences(settings, ranks, normalization))
    if kind in ("fsdp", "fsdp2") and settings.use_cpu:
        text = (
            "The HF Trainer has no FSDP on CPUs and silently runs plain DDP. Here weights, gradients and "
            "optimizer state are sharded on CPUs too."
        )
        found.append(Difference(("fsdp", "use_cpu"), text, is_alike=False))
    return [*found, *(Difference(about, text, is_alike=True) for about, text in _alike(settings))]


def _loss_differences(
    settings: Settings, ranks: int | None, normalization: Normalization
) -> Iterator[Difference]:
    """List how the HF Trainer's loss and gradient differ from those of the mean over all items."""
    is_native = normalization == "native"
    accumulation, norm = settings.gradient_accumulation_steps, settings.max_grad_norm
    # Without average_tokens_across_devices the ranks' gradients are averaged as they are.
    scaling = ranks if settings.average_tokens_across_devices else 1
    about = ("gradient_accumulation_steps", "average_tokens_across_devices")
    if scaling is None or accumulation * scaling > 1:
        here = (
            'Here they are the same: loss_normalization="native"; "exact" has them as of the mean over all '
            "items."
            if is_native
            else 'Here they are those of the mean over all items: loss_normalization="exact"; "native" has '
            "the factor, to the bit."
        )
        text = (
            f"In the HF Trainer, loss and gradient are {_factor(accumulation, scaling)} times too large for "
            "models that ignore num_items_in_batch and return the mean of their own micro-batch "
            f"({_OWN_MEAN}); for those that divide by it ({_DIVIDING}) they are right. {here}"
        )
        yield Difference(about, text, is_native)
        if norm > 0:
            limit = (
                f"{norm / accumulation:.4g}/W"
                if scaling is None
                else f"{norm / (accumulation * scaling):.4g}"
            )
            text = (
                f"The HF Trainer, with max_grad_norm={norm:g}, clips those models' gradients from a norm of "
                f"{limit} on, since it sees the enlarged ones. "
            )
            here = "Here too." if is_native else f"Here from {norm:g} on."
            yield Difference(("max_grad_norm", *about), text + here, is_native)
    if ranks is None or accumulation * ranks > 1:
        text = (
            "In the HF Trainer, the micro-batches of a step count alike for models that do not take "
            "num_items_in_batch (ConvNeXt, Gemma 3, extractive question answering), however many labels each "
            "has. "
        )
        yield Difference(about[:1], text + _here("each counts by its labels", is_native), is_native)
    text = (
        "In the HF Trainer, the loss of GPT-2, CTRL, XLNet, XLM and Reformer is divided by one token too "
        "many per sequence: sequences of 512 tokens give 0.998 of the mean. "
    )
    yield Difference((), text + _here("it is the mean", is_native), is_native)
    if settings.eval_strategy != "no" and scaling != 1:
        yield _eval_loss_difference(scaling, ranks, is_native)


def _eval_loss_difference(scaling: int | None, ranks: int | None, is_native: bool) -> Difference:
    times = (
        f"W times too large (W: the number of ranks; {UNDECIDED})"
        if scaling is None
        else f"{scaling} times too large on {ranks} ranks"
    )
    text = f"In the HF Trainer, eval_loss of models that ignore num_items_in_batch is {times}. "
    about = ("eval_strategy", "average_tokens_across_devices")
    return Difference(about, text + _here("it is the mean", is_native), is_native)


def _here(exact: str, is_native: bool) -> str:
    return "Here too." if is_native else f"Here {exact}."


def _factor(accumulation: int, ranks: int | None) -> str:
    """Write G x W, the factor by which the gradient of a step is too large; `ranks` is W."""
    if ranks is not None:
        product = f"{accumulation}·{ranks} = {accumulation * ranks}"
        return f"G = {accumulation}" if ranks == 1 else f"G·W = {product}"
    meaning = f"the number of ranks; {UNDECIDED}"
    return f"W ({meaning})" if accumulation == 1 else f"G·W = {accumulation}·W (W: {meaning})"


def _alike(settings: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """List what hfbridge does as the HF Trainer does, and is easily overlooked."""
    schedule, accumulation = settings.lr_scheduler_type, settings.gradient_accumulation_steps
    if settings.warmup_steps and schedule not in ("constant", *FOLLOWING):
        begins = (
            "begins at one warmup step's share of the learning rate"
            if schedule == "cosine_warmup_with_min_lr"
            else "is made with learning rate 0"
        )
        yield (
            ("warmup_steps", "lr_scheduler_type"),
            f"The first step {begins}; the full rate of {settings.learning_rate:g} comes after "
            f"{_warmup(settings)}.",
        )
    if accumulation > 1:
        yield (
            ("gradient_accumulation_steps",),
            f"What is left at the end of an epoch, fewer than {accumulation} micro-batches, is a step of its "
            "own.",
        )
    if settings.train_sampling_strategy == "group_by_length" and settings.data_seed is not None:
        yield (
            ("train_sampling_strategy", "data_seed"),
            "The order is drawn from the global generator: data_seed is not read.",
        )
    if settings.save_only_model and settings.save_strategy != "no":
        yield (
            ("save_only_model",),
            "Checkpoints hold no optimizer, schedule and random states: no run resumes from them exactly.",
        )


def _warmup(settings: Settings) -> str:
    """Describe how long the warmup is.

    Mirrors: transformers.TrainingArguments.get_warmup_steps
    """
    warmup, steps = settings.warmup_steps, settings.max_steps
    if warmup >= 1:
        return f"{int(warmup)} steps"
    return (
        f"{math.ceil(steps * warmup)} of {steps} steps"
        if steps > 0
        else f"{warmup:.4g} of all steps, rounded up"
    )


@dataclass(frozen=True, slots=True)
class Explained:
    """What one set of settings becomes.

    Attributes:
        where: the file, or what else holds the settings.
        plan: of the run with what is supported; `None` if there is none.
        refused: what is not supported.
        differences: what the HF Trainer does that its settings do not show.
        notes: further remarks.
    """

    where: str
    plan: Plan | None
    refused: tuple[Problem, ...] = ()
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain data; tokens are hidden."""
        plan = self.plan
        return {
            "where": self.where,
            "refused": [{"subject": problem.subject, "text": problem.text} for problem in self.refused],
            "differences": [
                {"about": list(found.about), "text": found.text, "alike": found.is_alike}
                for found in self.differences
            ],
            "settings": [] if plan is None else [_row(row) for row in plan.rows],
            "trainer": {} if plan is None else _arguments(plan),
            "undecided": [] if plan is None else list(plan.undecided),
            "strategy": None if plan is None else _strategy(plan),
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Lay it out for a page of 100 columns, most important first."""
        yield self.where
        if self.refused:
            yield from ("", "refused", describe_problems(self.refused))
        yield from self._section("differs from the HF Trainer", is_alike=False)
        if self.plan is not None and self.plan.rows:
            yield from ("", *self.plan.table())
        yield from self._section("as in the HF Trainer, and easily overlooked", is_alike=True)
        shown = "\n".join(row.note for row in self.plan.rows) if self.plan is not None else ""
        others = [note for note in self.notes if note not in shown]
        yield from ("", "besides") if others else ()
        for note in others:
            yield from _wrapped(note)
        if self.plan is not None:
            yield from ("", "arguments of lightning.Trainer", *self.plan.arguments())

    def _section(self, headline: str, *, is_alike: bool) -> Iterator[str]:
        listed = [found for found in self.differences if found.is_alike == is_alike]
        yield from ("", headline) if listed else ()
        for found in listed:
            yield from _wrapped(f"{', '.join(found.about)}: {found.text}" if found.about else found.text)


@dataclass(frozen=True, slots=True)
class Overridden:
    """A method or attribute of `transformers.Trainer` that a subclass, or the object, overrides.

    Attributes:
        name: of the method or attribute; "args" is the settings.
        where: how the user wrote it: ``WeightedTrainer.compute_loss``.
        becomes: "called", or "read" if it is no method, as by the HF Trainer; or "refused".
        reason: why it is unsupported.
    """

    name: str
    where: str
    becomes: Literal["called", "read", "refused"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.becomes}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What settings, or the run of a script, become; `str` of it is a page of 100 columns.

    Attributes:
        source: what is explained.
        parts: one for each set of settings in it.
        overridden: what the Trainer of a script overrides.
        ending: how far it went.
    """

    source: str
    parts: tuple[Explained, ...]
    overridden: tuple[Overridden, ...] = ()
    ending: str = "Nothing was loaded."

    @property
    def refused(self) -> tuple[Problem, ...]:
        """Everything that is not supported."""
        overridden = (Problem(one.where, one.reason) for one in self.overridden if one.becomes == "refused")
        return (*(problem for part in self.parts for problem in part.refused), *overridden)

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain data; tokens are hidden."""
        return {
            "source": self.source,
            "is_refused": bool(self.refused),
            "parts": [part.as_dict() for part in self.parts],
            "overridden": [asdict(one) for one in self.overridden],
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for part in self.parts:
            lines += ["", *part.lines()] if lines else part.lines()
        if self.overridden:
            lines += ["", "overridden", *(line for one in self.overridden for line in _wrapped(str(one)))]
        count = len(self.refused)
        total = f"{count} refused." if count else "Nothing is refused."
        return "\n".join([*lines, "", f"{total} {self.ending}"])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _row(row: Row) -> dict[str, Any]:
    is_secret = row.field.endswith("_token") and row.value is not None
    value = "<hidden>" if is_secret else _plain(row.value)
    return {"setting": row.field, "value": value, "becomes": row.used_by, "note": row.note}


def _arguments(plan: Plan) -> dict[str, Any]:
    return {
        name: "never" if is_same(value, NEVER) else _plain(value)
        for name, value in plan.trainer_arguments.items()
    }


def _strategy(plan: Plan) -> dict[str, Any] | None:
    """Return the strategy as data; `None` if it is made when the config runs."""
    if "strategy" in plan.undecided:
        return None
    return {"kind": plan.strategy.kind, "options": _plain(plan.strategy.options)}


def _plain(value: Any) -> Any:
    """Convert a value to what JSON can hold: objects by the name of their class."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if type(value).__module__ in ("datetime", "pathlib") else type(value).__name__


_ARGUMENT = re.compile(r"Trainer\((\w+)=")


@dataclass
class _Part:
    """Unchecked settings, and what is passed with them.

    Attributes:
        where: the file, or what else holds them.
        values: the settings.
        arguments: of the Trainer.
        normalization: of the HFModule; `None` if it is not passed.
        notes: on them.
        makes_strategy: the strategy is an object that the config describes.
    """

    where: str
    values: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    normalization: Normalization | None = None
    notes: tuple[str, ...] = ()
    makes_strategy: bool = False


def explain(
    source: SettingsSource,
    *,
    strategy: str | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    accelerate_config: str | os.PathLike[str] | None = None,
    loss_normalization: Normalization | None = None,
) -> Explanation:
    """Explain what settings become, what differs from the HF Trainer, and what is unsupported.

    Arguments other than `source` take precedence over it.

    Args:
        source: settings, a `TrainingArguments`, a dict, or the path of a YAML or JSON file.
        strategy: of the Trainer.
        devices: ranks on each node.
        num_nodes: of the Trainer.
        accelerate_config: of the Trainer.
        loss_normalization: of the HFModule; "exact" if the source has none either.

    Returns:
        The explanation. Nothing is loaded.

    Raises:
        SettingsError: the source cannot be read, holds no settings, or is a script.

    Proved by: tests/unit/test_explain.py
    """
    name, part = _read(source)
    part.arguments |= {
        argument: value
        for argument, value in (
            ("strategy", strategy),
            ("devices", devices),
            ("num_nodes", num_nodes),
            ("accelerate_config", accelerate_config),
        )
        if value is not None
    }
    part.normalization = loss_normalization or part.normalization or "exact"
    return Explanation(name, (_explain(part),))


def _read(source: SettingsSource) -> tuple[str, _Part]:
    """Find the settings in a source, unchecked."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix.lower() == ".py":
            command = f"hfbridge run --dry-run {path}"
            raise SettingsError(
                f"{path} is a script: `{command}` runs it up to `train()` and prints the plan."
            )
        values = read_file(path)
        is_config = isinstance(values.get("trainer"), Mapping)
        return str(path), _read_config(str(path), values) if is_config else _Part(str(path), values)
    name = "settings" if isinstance(source, Mapping) else type(source).__name__
    return name, _Part(name, source)


def _read_config(where: str, config: Mapping[str, Any]) -> _Part:
    """Read a config of `hfbridge fit`: settings and arguments of the Trainer."""
    arguments = dict(config["trainer"])
    settings = arguments.pop("settings", None) or {}
    # What a class_path describes is made when it runs; none of these conflicts with a setting.
    described = [name for name in ("callbacks", "logger", "profiler", "plugins") if arguments.pop(name, None)]
    arguments.pop("asynchronous_saving", None)
    if makes_strategy := isinstance(arguments.get("strategy"), Mapping):
        described.append("strategy")
        del arguments["strategy"]
    notes = tuple(f"trainer.{name} is made when it runs" for name in described)
    model = config.get("model")
    normalization = model.get("loss_normalization") if isinstance(model, Mapping) else None
    values = read_file(settings) if isinstance(settings, str) else settings
    chosen: Normalization | None = "native" if normalization == "native" else None
    return _Part(where, values, arguments, chosen, notes, makes_strategy)


def _explain(part: _Part) -> Explained:
    """Check settings, and plan their run without what is unsupported."""
    plan, refused = _plan(part)
    if plan is None:
        return Explained(part.where, plan, tuple(refused), notes=part.notes)
    if part.makes_strategy and "strategy" not in part.arguments:
        # The strategy, and the ranks that it decides, are known only when the config runs.
        names = {"strategy", "devices"} - part.arguments.keys()
        kept = {name: value for name, value in plan.trainer_arguments.items() if name not in names}
        plan = replace(plan, trainer_arguments=MappingProxyType(kept), undecided=tuple(sorted(names)))
    kind = None if "strategy" in plan.undecided else plan.strategy.kind
    return Explained(
        part.where,
        plan,
        tuple(refused),
        differences=tuple(
            differences(
                plan.settings, ranks=_ranks(plan), kind=kind, normalization=part.normalization or "exact"
            )
        ),
        notes=(*plan.notes, *part.notes, *_missing_packages(plan.settings)),
    )


def _plan(part: _Part) -> tuple[Plan | None, list[Problem]]:
    """Plan the run of what is supported, and list the problems.

    What has a problem is removed, and the rest tried again: what then fails does so only because of what was
    removed, and is removed silently.
    """
    values, arguments = part.values, dict(part.arguments)
    accelerate = arguments.pop("accelerate_config", None)
    first: dict[str, list[Problem]] = {}
    for _ in range(10):
        stage, merged = "settings", arguments
        try:
            settings = Settings.of(values)
            if accelerate is not None:
                stage, config = "accelerate", read_accelerate_config(accelerate)
                settings, merged = config.applied_to(settings, arguments, environment={})
            stage = "trainer"
            return translate(settings, merged), [problem for found in first.values() for problem in found]
        except SettingsError as error:
            problems = list(error.problems) or [Problem("settings", str(error))]
        first.setdefault(stage, problems)
        values = _values(values) if stage == "settings" else dict(Settings.of(values).given)
        if stage == "accelerate":
            accelerate = None
        elif not _remove(problems, values, arguments):
            break
    return None, [problem for found in first.values() for problem in found]


def _values(source: Any) -> dict[str, Any]:
    """Return the values of a source that `Settings.of` does not accept."""
    if isinstance(source, TrainingArguments):
        return {name: getattr(source, name) for name in source.to_dict()}
    return dict(source) if isinstance(source, Mapping) else {}


def _remove(problems: list[Problem], values: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Remove what problems are about from values and arguments; returns whether something was removed."""
    before = len(values) + len(arguments)
    for problem in problems:
        if match := _ARGUMENT.match(problem.subject):
            arguments.pop(match[1], None)
        else:
            values.pop(problem.subject.partition(" = ")[0], None)
    return len(values) + len(arguments) < before


def _ranks(plan: Plan) -> int | None:
    """Count the ranks of a run; `None` if that is known only when it runs."""
    if "devices" in plan.undecided:
        return None
    if plan.strategy.kind == "single":
        return 1
    devices = plan.trainer_arguments.get("devices", "auto")
    nodes = plan.trainer_arguments.get("num_nodes") or 1
    if isinstance(devices, list | tuple):
        return len(devices) * nodes
    try:
        count = int(devices)
    except (TypeError, ValueError):
        return None
    return count * nodes if count > 0 else None


def _missing_packages(settings: Settings) -> list[str]:
    try:
        require_packages(settings)
    except MissingDependencyError as error:
        return [f"on this machine: {problem.subject} {problem.text}" for problem in error.problems]
    return []
