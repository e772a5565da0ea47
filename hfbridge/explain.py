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
from hfbridge.settings import UNDECIDED, Plan, Settings, SettingsSource, require_packages, translate
from hfbridge.settings.accelerate_config import read_accelerate_config
from hfbridge.settings.io import read_file
from hfbridge.settings.plan import NEVER
from hfbridge.settings.rules import is_same
from hfbridge.settings.schedulers import FOLLOWING

_OWN_MEAN = "BERT, RoBERTa, DistilBERT and DeBERTa with most heads, T5, BART, Marian, Whisper, Segformer"
_DIVIDING = "Llama, Qwen, Mistral, ViT"
_ROW_TOKENS = 512  # of the example for models that count a token too many


@dataclass(frozen=True, slots=True)
class Difference:
    """Something about the native Trainer that one should know.

    Attributes:
        about: the settings it comes from.
        text: what the native Trainer does, in numbers, and what hfbridge does.
        is_alike: whether hfbridge does the same.
    """

    about: tuple[str, ...]
    text: str
    is_alike: bool


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run before it runs.

    Attributes:
        settings: of the run.
        ranks: how many there are; `None` if only the machine knows.
        kind: of the strategy; `None` if it is made when the run begins.
        loss_normalization: that of the HFModule.
    """

    settings: Settings
    ranks: int | None
    kind: str | None
    loss_normalization: Literal["exact", "native"]

    def here(self, *, exact: str, native: str) -> str:
        """Say what hfbridge does, by the normalisation of the loss."""
        return native if self.loss_normalization == "native" else exact


def differences(run: Run) -> Iterator[Difference]:
    """Tell what the native Trainer does that its settings do not say.

    Args:
        run: what is known of it.

    Yields:
        One thing after the other: first what differs, then what is alike.
    """
    yield from _of_the_loss(run)
    if run.kind in ("fsdp", "fsdp2") and run.settings.use_cpu:
        yield Difference(
            ("fsdp", "use_cpu"),
            "Natively FSDP is not there on CPUs: the run is plain DDP, without a word. Here weights, "
            "gradients and optimizer state are shared, on CPUs too.",
            is_alike=False,
        )
    yield from _alike(run)


def _of_the_loss(run: Run) -> Iterator[Difference]:
    is_alike, ranks, factor = run.loss_normalization == "native", run.ranks, _Factor.of(run)
    about = ("gradient_accumulation_steps", "average_tokens_across_devices")
    if factor.may_exceed_one:
        here = run.here(
            exact='Here they are those of the mean over all items: loss_normalization="exact"; "native" has '
            "the factor, to the bit.",
            native='Here they are the same: loss_normalization="native"; "exact" has them as of the mean '
            "over all items.",
        )
        yield Difference(
            about,
            f"Natively loss and gradient are {factor.told} times too large for models that ignore "
            f"num_items_in_batch and return the mean of their own micro-batch ({_OWN_MEAN}); for those that "
            f"divide by it ({_DIVIDING}) they are right. {here}",
            is_alike,
        )
    if factor.may_exceed_one and run.settings.max_grad_norm > 0:
        yield Difference(("max_grad_norm", *about), _clipping(run, factor), is_alike)
    if ranks is None or factor.accumulation * ranks > 1:
        yield Difference(
            about[:1],
            "Natively the micro-batches of a step count alike for models that do not take num_items_in_batch "
            "(ConvNeXt, Gemma 3, extractive question answering), however many labels each has. "
            + run.here(exact="Here each counts by its labels.", native="Here too."),
            is_alike,
        )
    yield Difference(
        (),
        "Natively the loss of GPT-2, CTRL, XLNet, XLM and Reformer is divided by one token a row too many: "
        f"rows of {_ROW_TOKENS} tokens give {(_ROW_TOKENS - 1) / _ROW_TOKENS:.3f} of the mean. "
        + run.here(exact="Here it is the mean.", native="Here too."),
        is_alike,
    )
    if run.settings.eval_strategy != "no" and (factor.ranks is None or factor.ranks > 1):
        times = f"W times too large (W: the number of ranks; {UNDECIDED})"
        yield Difference(
            ("eval_strategy", "average_tokens_across_devices"),
            "Natively eval_loss of models that ignore num_items_in_batch is "
            + (times if factor.ranks is None else f"{factor.ranks} times too large on {ranks} ranks")
            + f". {run.here(exact='Here it is the mean.', native='Here too.')}",
            is_alike,
        )


@dataclass(frozen=True, slots=True)
class _Factor:
    """How many times too large the gradient of a step is natively: G x W.

    Attributes:
        accumulation: G.
        ranks: W, or 1 where ranks are averaged as they are; `None` if only the machine knows.
    """

    accumulation: int
    ranks: int | None

    @classmethod
    def of(cls, run: Run) -> "_Factor":
        """Read it from what is known."""
        # Without average_tokens_across_devices the ranks' gradients are averaged as they are.
        ranks = run.ranks if run.settings.average_tokens_across_devices else 1
        return cls(run.settings.gradient_accumulation_steps, ranks)

    @property
    def value(self) -> int | None:
        """The number, if it is known."""
        return None if self.ranks is None else self.accumulation * self.ranks

    @property
    def may_exceed_one(self) -> bool:
        """Whether there is anything to tell."""
        return self.value is None or self.value > 1

    @property
    def told(self) -> str:
        """Write the product, and what it is."""
        if self.ranks is None:
            product = "W" if self.accumulation == 1 else f"G·W = {self.accumulation}·W"
            meaning = f"the number of ranks; {UNDECIDED}"
            return f"{product} ({meaning})" if self.accumulation == 1 else f"{product} (W: {meaning})"
        if self.ranks == 1:
            return f"G = {self.accumulation}"
        return f"G·W = {self.accumulation}·{self.ranks} = {self.value}"


def _clipping(run: Run, factor: _Factor) -> str:
    """Say from which norm on gradients are clipped, natively and here."""
    norm = run.settings.max_grad_norm
    at = f"{norm / factor.accumulation:.4g}/W" if factor.value is None else f"{norm / factor.value:.4g}"
    return (
        f"Natively max_grad_norm={norm:g} clips those models' gradients from a norm of {at} on, since it "
        f"sees the enlarged ones. {run.here(exact=f'Here from {norm:g} on.', native='Here too.')}"
    )


def _alike(run: Run) -> Iterator[Difference]:
    """Tell what hfbridge does as natively, and is easily overlooked."""
    settings = run.settings
    yield from _of_the_warmup(run)
    accumulation = settings.gradient_accumulation_steps
    if accumulation > 1:
        yield Difference(
            ("gradient_accumulation_steps",),
            f"What is left at the end of an epoch, fewer than {accumulation} micro-batches, is a step of its "
            "own.",
            is_alike=True,
        )
    if settings.train_sampling_strategy == "group_by_length" and settings.data_seed is not None:
        yield Difference(
            ("train_sampling_strategy", "data_seed"),
            "The order is drawn from the global generator: data_seed is not read.",
            is_alike=True,
        )
    if settings.save_only_model and settings.save_strategy != "no":
        yield Difference(
            ("save_only_model",),
            "Checkpoints hold no optimizer, schedule and random states: no run goes on from them exactly.",
            is_alike=True,
        )


def _of_the_warmup(run: Run) -> Iterator[Difference]:
    settings, schedule = run.settings, run.settings.lr_scheduler_type
    if settings.warmup_steps == 0 or schedule in ("constant", *FOLLOWING):
        return
    begins = (
        "begins at one warmup step's share of the learning rate"
        if schedule == "cosine_warmup_with_min_lr"
        else "is made with learning rate 0"
    )
    yield Difference(
        ("warmup_steps", "lr_scheduler_type"),
        f"The first step {begins}; the full rate of {settings.learning_rate:g} comes after "
        f"{_warmup(settings)}.",
        is_alike=True,
    )


def _warmup(settings: Settings) -> str:
    """Say how long the warmup is.

    Mirrors: transformers.TrainingArguments.get_warmup_steps
    """
    said, steps = settings.warmup_steps, settings.max_steps
    if said >= 1:
        return f"{int(said)} steps"
    if steps > 0:
        return f"{math.ceil(steps * said)} of {steps} steps"
    return f"{said:.4g} of all steps, rounded up"


_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Explained:
    """What was found out about one set of settings.

    Attributes:
        where: the file, or what else holds the settings.
        plan: what becomes of the settings that are not refused; `None` if nothing does.
        refused: what is not carried out.
        differences: what the native Trainer does that its settings do not say.
        notes: what else one should know.
    """

    where: str
    plan: Plan | None
    refused: tuple[Problem, ...] = ()
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "where": self.where,
            "refused": [_problem(problem) for problem in self.refused],
            "differences": [
                {"about": list(found.about), "text": found.text, "alike": found.is_alike}
                for found in self.differences
            ],
            "settings": [] if self.plan is None else [_row(row) for row in self.plan.rows],
            "trainer": {} if self.plan is None else _arguments(self.plan),
            "undecided": [] if self.plan is None else list(self.plan.undecided),
            "strategy": None if self.plan is None else _strategy(self.plan),
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """Lay it out for a page of 100 columns: what matters most comes first."""
        yield self.where
        if self.refused:
            yield from ("", "refused", describe_problems(self.refused))
        yield from self._told("differs from the native Trainer", is_alike=False)
        if self.plan is not None and self.plan.rows:
            yield from ("", *self.plan.table())
        yield from self._told("as natively, and easily overlooked", is_alike=True)
        rows = "\n".join(row.note for row in self.plan.rows) if self.plan is not None else ""
        others = [note for note in self.notes if note not in rows]
        yield from ("", "besides") if others else ()
        for note in others:
            yield from _wrapped(note)
        if self.plan is not None:
            yield from ("", "lightning.Trainer is given", *self.plan.arguments())

    def _told(self, headline: str, *, is_alike: bool) -> Iterator[str]:
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
        becomes: it is called, or read if it is no method, when the HF Trainer does so; or it is refused.
        reason: why it is refused; empty if it is not.
    """

    name: str
    where: str
    becomes: Literal["called", "read", "refused"]
    reason: str = ""

    def __str__(self) -> str:
        """Say what becomes of it."""
        return f"{self.where}: {self.becomes}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found out about settings, or about the run of a script; `str` of it is a page.

    Attributes:
        source: what was asked about.
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
        """Everything that is not carried out."""
        overridden = (Problem(one.where, one.reason) for one in self.overridden if one.becomes == "refused")
        return (*(problem for part in self.parts for problem in part.refused), *overridden)

    def as_dict(self) -> dict[str, Any]:
        """Give the same as plain data; tokens are hidden."""
        return {
            "source": self.source,
            "is_refused": bool(self.refused),
            "parts": [part.as_dict() for part in self.parts],
            "overridden": [asdict(one) for one in self.overridden],
        }

    def __str__(self) -> str:
        """Lay everything out for a page of 100 columns."""
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


def _problem(problem: Problem) -> dict[str, str]:
    return {"subject": problem.subject, "text": problem.text}


def _row(row: Any) -> dict[str, Any]:
    is_secret = row.field.endswith("_token") and row.value is not None
    return {
        "setting": row.field,
        "value": "<hidden>" if is_secret else _plain(row.value),
        "becomes": row.used_by,
        "note": row.note,
    }


def _arguments(plan: Plan) -> dict[str, Any]:
    """Give the arguments of Lightning as data; epochs that never come are "never"."""
    never = {name for name, value in plan.trainer_arguments.items() if is_same(value, NEVER)}
    return {
        name: "never" if name in never else _plain(value) for name, value in plan.trainer_arguments.items()
    }


def _strategy(plan: Plan) -> dict[str, Any] | None:
    """Give the strategy as data; `None` if it is made when the config runs."""
    if "strategy" in plan.undecided:
        return None
    return {"kind": plan.strategy.kind, "options": _plain(plan.strategy.options)}


def _plain(value: Any) -> Any:
    """Make a value what JSON can hold: objects by the name of their class."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if type(value).__module__ in ("datetime", "pathlib") else type(value).__name__


Normalization = Literal["exact", "native"]

_ARGUMENT = re.compile(r"Trainer\((\w+)=")


@dataclass
class _Part:
    """Settings as they were found, and what else is passed with them.

    Attributes:
        where: the file, or what else holds them.
        values: the settings.
        arguments: of the Trainer.
        normalization: of the HFModule; `None` if it is not passed.
        notes: what one should know about them.
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
    """Say what settings become, what differs from the native Trainer, and what is refused.

    Args:
        source: settings, a `TrainingArguments`, a dict, or the path of a YAML or JSON file.
        strategy: that of the Trainer; wins over what the source says.
        devices: ranks on each node; likewise.
        num_nodes: nodes; likewise.
        accelerate_config: that of the Trainer; likewise.
        loss_normalization: that of the HFModule; likewise. "exact" without one.

    Returns:
        The explanation. Nothing is loaded.

    Raises:
        SettingsError: the source cannot be read, holds no settings, or is a script.

    Proved by: tests/unit/test_explain.py
    """
    name, part = _read(source)
    given = {
        "strategy": strategy,
        "devices": devices,
        "num_nodes": num_nodes,
        "accelerate_config": accelerate_config,
    }
    part.arguments.update({argument: value for argument, value in given.items() if value is not None})
    part.normalization = loss_normalization or part.normalization or "exact"
    return Explanation(name, (_explain(part),))


def _read(source: SettingsSource) -> tuple[str, _Part]:
    """Find the settings in a source, without judging them."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.suffix.lower() == ".py":
            raise SettingsError(
                f"{path} is a script: `hfbridge run --dry-run {path}` runs it up to `train()` and prints the "
                "plan."
            )
        values = read_file(path)
        is_config = isinstance(values.get("trainer"), Mapping)
        return str(path), _of_config(str(path), values) if is_config else _Part(str(path), values)
    name = "settings" if isinstance(source, Mapping) else type(source).__name__
    return name, _Part(name, source)


def _of_config(where: str, config: Mapping[str, Any]) -> _Part:
    """Read a config of `hfbridge fit`: settings and arguments of the Trainer."""
    arguments = dict(config["trainer"])
    settings = arguments.pop("settings", None) or {}
    # What a class_path describes is made when it runs; no setting is contradicted by these.
    described = [name for name in ("callbacks", "logger", "profiler", "plugins") if arguments.pop(name, None)]
    arguments.pop("asynchronous_saving", None)
    if makes_strategy := isinstance(arguments.get("strategy"), Mapping):
        described.append("strategy")
        del arguments["strategy"]
    notes = tuple(f"trainer.{name} is made when it runs" for name in described)
    model = config.get("model")
    normalization = model.get("loss_normalization") if isinstance(model, Mapping) else None
    values = read_file(settings) if isinstance(settings, str) else settings
    return _Part(
        where,
        values,
        arguments,
        "native" if normalization == "native" else None,
        notes=notes,
        makes_strategy=makes_strategy,
    )


def _explain(part: _Part) -> Explained:
    """Judge settings, and plan their run without what is refused."""
    plan, refused = _plan(part)
    if plan is None:
        return Explained(part.where, plan, tuple(refused), notes=part.notes)
    if part.makes_strategy and "strategy" not in part.arguments:
        plan = _without_strategy(plan, part)
    kind = None if "strategy" in plan.undecided else plan.strategy.kind
    return Explained(
        part.where,
        plan,
        tuple(refused),
        differences=tuple(differences(Run(plan.settings, _ranks(plan), kind, part.normalization or "exact"))),
        notes=(*plan.notes, *part.notes, *_lacking(plan.settings)),
    )


def _plan(part: _Part) -> tuple[Plan | None, list[Problem]]:
    """Plan the run of what is not refused, and list what is.

    What is refused is taken out, and the rest tried again: what is then wrong is so for want of what was
    taken out, and is taken out without a word.
    """
    values, arguments = part.values, dict(part.arguments)
    accelerate = arguments.pop("accelerate_config", None)
    told: dict[str, list[Problem]] = {}
    for _ in range(10):
        stage, said = "settings", arguments
        try:
            settings = Settings.of(values)
            if accelerate is not None:
                stage, config = "accelerate", read_accelerate_config(accelerate)
                settings, said = config.applied_to(settings, arguments, environment={})
            stage = "trainer"
            return translate(settings, said), [problem for found in told.values() for problem in found]
        except SettingsError as error:
            problems = list(error.problems) or [Problem("settings", str(error))]
        told.setdefault(stage, problems)
        values = _values(values) if stage == "settings" else dict(Settings.of(values).given)
        if stage == "accelerate":
            accelerate = None
        elif not _take_out(problems, values, arguments):
            break
    return None, [problem for found in told.values() for problem in found]


def _without_strategy(plan: Plan, part: _Part) -> Plan:
    """Take out the strategy, which is made when the config runs, and the ranks that it decides."""
    names = {"strategy", "devices"} - part.arguments.keys()
    kept = {name: value for name, value in plan.trainer_arguments.items() if name not in names}
    return replace(plan, trainer_arguments=MappingProxyType(kept), undecided=tuple(sorted(names)))


def _values(source: Any) -> dict[str, Any]:
    """Name the values of what could not be taken as settings."""
    if isinstance(source, TrainingArguments):
        return {name: getattr(source, name) for name in source.to_dict()}
    return dict(source) if isinstance(source, Mapping) else {}


def _take_out(problems: list[Problem], values: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Take what problems are about out of values and arguments; returns whether something was."""
    before = len(values) + len(arguments)
    for problem in problems:
        if match := _ARGUMENT.match(problem.subject):
            arguments.pop(match[1], None)
        else:
            values.pop(problem.subject.partition(" = ")[0], None)
    return len(values) + len(arguments) < before


def _ranks(plan: Plan) -> int | None:
    """Count the ranks of a run; `None` if only the machine knows, or the strategy of a config."""
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


def _lacking(settings: Settings) -> list[str]:
    """Say which packages this machine lacks."""
    try:
        require_packages(settings)
    except MissingDependencyError as error:
        return [f"on this machine: {problem.subject} {problem.text}" for problem in error.problems]
    return []
