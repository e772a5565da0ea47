"""One job on both engines, live: `theirs` the native Trainer, `ours` hfbridge; and what each of them did.

Every quantity is kept as it was, or as a digest of its bytes, so that "identical" means to the bit.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers import Trainer as NativeTrainer

import hfbridge
from tests.tiny import PadRows, make_model, make_rows

BASE: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "num_train_epochs": 1,
}
FIRST_EVAL_ID = 10_000
_TIMES = ("runtime", "per_second", "preparation_time")
# Of TrainerState: the history is compared row by row.
_NOT_COMPARED = ("log_history",)
# Packages whose optimizers keep objects in their state.
_WITH_OBJECTS = ("galore_torch", "apollo_torch")


class RecordingCollator:
    """Note the ids of the rows it is given, drop them, and let another collator do the work."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.inner = inner
        self.ids: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        self.ids.append([row["idx"] for row in rows if "idx" in row])
        return self.inner([{name: v for name, v in row.items() if name != "idx"} for row in rows])

    @property
    def train_ids(self) -> list[list[int]]:
        """Ids of the training micro-batches, in the order of their collation."""
        return [ids for ids in self.ids if ids and ids[0] < FIRST_EVAL_ID]


class Recorder(TrainerCallback):
    """The same unmodified TrainerCallback on both sides."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.steps: list[dict[str, Any]] = []
        self.seen: list[str] = []  # digests of the training micro-batches, as they reach the model
        self._hook: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_init_end", state, control, kwargs, asdict(state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook = kwargs["model"].register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        self._note("on_train_begin", state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()
        self.steps.append({"step": state.global_step, "rng at the end": rng_digest()})
        self._note("on_train_end", state, control, kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_epoch_begin", state, control, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_epoch_end", state, control, kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = []  # filled as the window is trained
        self.steps.append({"step": state.global_step + 1, "rng": rng_digest(), "micro-batches": self.seen})
        self._note("on_step_begin", state, control, kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1].setdefault("gradients within the window", []).append(gradients_digest(kwargs["model"]))
        self._note("on_substep_end", state, control, kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.steps[-1] |= {
            "clipped gradients": gradients_digest(kwargs["model"]),
            "learning rates": [group["lr"] for group in groups],
        }
        self._note("on_pre_optimizer_step", state, control, kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1]["weights"] = weights_digest(kwargs["model"])
        self._note("on_optimizer_step", state, control, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1]["gradients cleared"] = all(p.grad is None for p in kwargs["model"].parameters())
        self._note("on_step_end", state, control, kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_prediction_step", state, control, kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_evaluate", state, control, kwargs, without_times(kwargs["metrics"]))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_log", state, control, kwargs, without_times(kwargs["logs"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("on_save", state, control, kwargs)

    def _note(self, event: str, state: Any, control: Any, kwargs: Any, extra: Any = None) -> None:
        flags = tuple(name for name, value in vars(control).items() if value is True)
        parts = tuple(sorted(name for name, value in kwargs.items() if value is not None))
        self.events.append((event, state.global_step, state.epoch, flags, parts, extra))

    @torch.compiler.disable  # of what is seen here nothing is part of the model
    def _note_inputs(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if model.training:
            tensors = {name: v for name, v in kwargs.items() if isinstance(v, Tensor)}
            self.seen.append(digest(*(t for _, t in sorted(tensors.items()))) + str(sorted(tensors)))


def digest(*tensors: Tensor) -> str:
    """Digest the bytes, shapes and dtypes of tensors."""
    found = hashlib.sha1()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def rng_digest() -> tuple[str, str, str]:
    """Digest the states of torch's, numpy's and Python's generators."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    return (
        digest(torch.get_rng_state()),
        hashlib.sha1(numpy_state["key"].tobytes() + str(numpy_state["pos"]).encode()).hexdigest()[:12],
        hashlib.sha1(repr(random.getstate()).encode()).hexdigest()[:12],
    )


def gradients_digest(model: nn.Module) -> str:
    """Digest all gradients, a missing one included."""
    return digest(*(torch.empty(0) if p.grad is None else p.grad for p in model.parameters()))


def weights_digest(model: nn.Module) -> str:
    """Digest all parameters, whole ones."""
    with whole(model):
        return digest(*model.parameters())


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather the parameters that ZeRO-3 has shared out."""
    in_parts = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not in_parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(in_parts):
        yield


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return its `state_dict`; ZeRO-3 takes the parameters out of the groups, so it has none."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if all(id(p) in held for p in optimizer.state):
        found: dict[str, Any] = optimizer.state_dict()
        return found
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    return {"state": list(optimizer.state.values()), "groups": groups}


def innermost(optimizer: Any) -> Any:
    """Find the optimizer within what accelerate, DeepSpeed and hfbridge put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a row what a clock says, and the values of what else the machine decides."""
    kept = {name: value for name, value in row.items() if not any(time in name for time in _TIMES)}
    return {name: None if "_mem_cpu" in name else value for name, value in kept.items()}


def digest_metrics(prediction: Any) -> dict[str, float]:
    """Reduce all predictions and labels to numbers that differ when any bit of them does."""
    found = {}
    for name, value in (("predictions", prediction.predictions), ("labels", prediction.label_ids)):
        joined = b"".join(f"{a.shape}{a.dtype}".encode() + a.tobytes() for a in arrays_in(value))
        found[name] = float(int(hashlib.sha1(joined).hexdigest()[:12], 16))
    found["mean"] = np.mean(arrays_in(prediction.predictions)[0])
    return found


def arrays_in(value: Any) -> list[Any]:
    """Flatten nested tuples of arrays."""
    return [a for part in value for a in arrays_in(part)] if isinstance(value, tuple) else [value]


@dataclass(frozen=True)
class Job:
    """What both engines are to do.

    Attributes:
        kind: kind of model and rows in tests/tiny.py.
        settings: what differs from `BASE`.
        rows: training rows; 46 are 12 micro-batches, the last one short.
        eval_rows: evaluation rows; 0 is no evaluation set.
        model: makes the model; called once by each side, before the Trainer is made.
        model_init: makes the model when the Trainer says so, instead of `model`.
        module_arguments: makes positional and keyword arguments of HFModule, instead of the model.
        collator: makes the collator, one for each side; `None` leaves the choice to the engine.
        callbacks: makes further callbacks, put after the recorder.
        compute_metrics: given to both.
        preprocess_logits_for_metrics: given to both.
        eval_keys: names under which the evaluation set is given, dealt out; `()` is one set without a name.
        as_dataset: wraps the list of rows.
        has_ids: rows have an `idx` that the collator drops.
        train_rows: training rows instead of those of the kind.
        validation_rows: evaluation rows instead of those of the kind.
        processing_class: given to both.
        compute_loss_func: given to both.
        optimizers: makes optimizer and schedule for a model.
        optimizer_cls_and_kwargs: given to both.
        data_arguments: given to HFDataModule alone.
        is_recorded: the collator is given within one that notes the ids of its rows.
    """

    kind: str = "distilbert"
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 46
    eval_rows: int = 11
    model: Callable[[], nn.Module] | None = None
    model_init: Callable[[], nn.Module] | None = None
    module_arguments: tuple[Sequence[Any], Mapping[str, Any]] | None = None
    collator: Callable[[], Any] | None = PadRows
    callbacks: Callable[[], list[Any]] = list
    compute_metrics: Any = digest_metrics
    preprocess_logits_for_metrics: Any = None
    eval_keys: Sequence[str] = ()
    as_dataset: Callable[[list[dict[str, Any]]], Any] = list
    has_ids: bool = True
    train_rows: list[dict[str, Any]] | None = None
    validation_rows: list[dict[str, Any]] | None = None
    processing_class: Any = None
    compute_loss_func: Any = None
    optimizers: Callable[[nn.Module], tuple[Any, Any]] | None = None
    optimizer_cls_and_kwargs: Any = None
    data_arguments: Mapping[str, Any] = field(default_factory=dict)
    is_recorded: bool = True

    def with_settings(self, **settings: Any) -> "Job":
        """Change some settings."""
        return replace(self, settings={**self.settings, **settings})

    def arguments(self) -> dict[str, Any]:
        """Return all settings."""
        return {**BASE, **self.settings}

    def make_collator(self) -> Any:
        """Make the job's collator, within a recording one if it is recorded; `None` without one."""
        made = None if self.collator is None else self.collator()
        return RecordingCollator(made) if self.is_recorded and made is not None else made

    def make_model(self) -> nn.Module:
        """Build the model."""
        return self.model() if self.model is not None else make_model(self.kind)

    def given_to_trainer(self, model: nn.Module | None) -> dict[str, Any]:
        """Return what the native Trainer and HFModule take under the same names."""
        return {
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
            "processing_class": self.processing_class,
            "compute_loss_func": self.compute_loss_func,
            "optimizers": (None, None) if self.optimizers is None else self.optimizers(model),  # type: ignore[arg-type]
            "optimizer_cls_and_kwargs": self.optimizer_cls_and_kwargs,
        }

    def datasets(self) -> tuple[Any, Any]:
        """Build the training and the evaluation set."""
        made = []
        given = (self.train_rows, self.validation_rows)
        for rows, count, seed, first in zip(
            given, (self.rows, self.eval_rows), (3, 5), (0, FIRST_EVAL_ID), strict=True
        ):
            if rows is None:
                rows = make_rows(self.kind, count, seed=seed)
            if self.has_ids:
                rows = [{**row, "idx": first + index} for index, row in enumerate(rows)]
            made.append(self.as_dataset(rows) if rows else None)
        if self.eval_keys:
            count = len(self.eval_keys)
            made[1] = {key: self.as_dataset(rows[i::count]) for i, key in enumerate(self.eval_keys)}
        return made[0], made[1]


@dataclass
class Record:
    """What one engine did.

    Attributes:
        steps: per optimizer step: random states when it began, micro-batches as the model saw them, clipped
            gradients, learning rates, weights.
        collated: ids of the training micro-batches, in the order of collation.
        events: trace of the TrainerCallback, with flags, arguments given, and rows.
        log_history: rows without times.
        state: the rest of TrainerState.
        weights: final `state_dict` of the model.
        optimizer: `state_dict` of the optimizer.
        scheduler: `state_dict` of the schedule.
        engine: the Trainer.
        module: HFModule, on our side.
    """

    steps: list[dict[str, Any]]
    collated: list[list[int]]
    events: list[tuple[Any, ...]]
    log_history: list[dict[str, Any]]
    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    engine: Any
    module: Any = None

    @property
    def event_names(self) -> list[str]:
        """The events without their circumstances."""
        return [event[0] for event in self.events]


def make_theirs(job: Job) -> tuple[NativeTrainer, Recorder, RecordingCollator | None]:
    """Make the native Trainer of a job."""
    recorder, collator = Recorder(), job.make_collator()
    train, evaluation = job.datasets()
    model = None if job.model_init is not None else job.make_model()
    generates = "predict_with_generate" in job.settings
    given = job.given_to_trainer(model)
    if generates:
        del given["optimizer_cls_and_kwargs"]  # which Seq2SeqTrainer does not take
    trainer = (Seq2SeqTrainer if generates else NativeTrainer)(
        model=model,
        model_init=job.model_init,
        args=(Seq2SeqTrainingArguments if generates else TrainingArguments)(**job.arguments()),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        callbacks=[recorder, *job.callbacks()],
        **given,
    )
    return trainer, recorder, collator


def run_theirs(job: Job) -> Record:
    """Run a job on the native Trainer."""
    made = make_theirs(job)
    made[0].train()
    return record_theirs(*made)


def record_theirs(trainer: NativeTrainer, recorder: Recorder, collator: RecordingCollator | None) -> Record:
    """Note what the native Trainer did."""
    optimizer = innermost(trainer.optimizer)
    return _record(recorder, collator, trainer.state, trainer.model, optimizer, trainer.lr_scheduler, trainer)


def make_ours(
    job: Job, *, loss_normalization: str = "native"
) -> tuple[hfbridge.Trainer, hfbridge.HFModule, hfbridge.HFDataModule, Recorder, RecordingCollator | None]:
    """Make Trainer, module and data of a job."""
    recorder, collator = Recorder(), job.make_collator()
    train, evaluation = job.datasets()
    model = None
    if job.module_arguments is not None:
        positional, named = job.module_arguments
    else:
        model = None if job.model_init is not None else job.make_model()
        positional, named = [job.model_init or model], {}
    module = hfbridge.HFModule(
        *positional, **named, **job.given_to_trainer(model), loss_normalization=loss_normalization
    )
    trainer = hfbridge.Trainer(
        job.arguments(), callbacks=[recorder, *job.callbacks()], logger=False, enable_model_summary=False
    )
    data = hfbridge.HFDataModule(
        train_dataset=train, eval_dataset=evaluation, data_collator=collator, **job.data_arguments
    )
    return trainer, module, data, recorder, collator


def run_ours(job: Job, *, loss_normalization: str = "native") -> Record:
    """Run a job on hfbridge."""
    trainer, module, data, recorder, collator = make_ours(job, loss_normalization=loss_normalization)
    trainer.fit(module, data)
    return record_ours(trainer, module, recorder, collator)


def record_ours(
    trainer: hfbridge.Trainer,
    module: hfbridge.HFModule,
    recorder: Recorder,
    collator: RecordingCollator | None,
) -> Record:
    """Note what hfbridge did."""
    scheduler, optimizer = module.schedule, innermost(trainer.optimizers[0])
    record = _record(recorder, collator, trainer.state_of_run, module.model, optimizer, scheduler, trainer)
    record.module = module
    return record


def _record(
    recorder: Recorder,
    collator: RecordingCollator | None,
    state: Any,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    engine: Any,
) -> Record:
    with whole(model):
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Record(
        steps=recorder.steps,
        collated=collator.train_ids if isinstance(collator, RecordingCollator) else [],
        events=recorder.events,
        log_history=[without_times(row) for row in state.log_history],
        state={name: value for name, value in asdict(state).items() if name not in _NOT_COMPARED},
        weights=weights,
        optimizer=optimizer_state(optimizer),
        scheduler=scheduler.state_dict(),
        engine=engine,
    )


def run_both(job: Job) -> tuple[Record, Record]:
    """Run a job on both engines and see that they did the same, to the bit."""
    set_seed(1)  # so that neither side profits from what the other left behind
    theirs = run_theirs(job)
    set_seed(2)
    ours = run_ours(job)
    assert_identical(theirs, ours)
    return theirs, ours


def assert_identical(theirs: Record, ours: Record) -> None:
    """Fail at the first step and quantity in which two runs differ in any bit.

    Raises:
        AssertionError: naming both.
    """
    for index, (their, our) in enumerate(zip(theirs.steps, ours.steps, strict=False)):
        same(f"step {their['step']} (number {index} of the run)", their, our)
    for index, (their, our) in enumerate(zip(theirs.log_history, ours.log_history, strict=False)):
        same(f"row {index} of log_history, step {their.get('step')}", their, our)
    for index, (their, our) in enumerate(zip(theirs.events, ours.events, strict=False)):
        before = theirs.event_names[max(index - 5, 0) : index]
        same(f"event {index} after {before}", list(their), list(our))
    same("number of steps", len(theirs.steps), len(ours.steps))
    same("number of rows", len(theirs.log_history), len(ours.log_history))
    same("number of events", len(theirs.events), len(ours.events))
    for name in ("collated", "state", "weights", "optimizer", "scheduler"):
        same(
            f"final {name}" if name != "collated" else "sample ids",
            getattr(theirs, name),
            getattr(ours, name),
        )


def same(where: str, their: Any, our: Any) -> None:
    """Compare nested values bit by bit; numpy scalars, ints and floats of one value are different things."""
    assert type(their) is type(our), (
        f"{where}: theirs is {their!r} ({type(their)}), ours {our!r} ({type(our)})"
    )
    if isinstance(their, Mapping) and any(isinstance(key, Tensor) for key in their):
        same(where, list(their.items()), list(our.items()))  # grokadamw keeps its state by parameter
    elif isinstance(their, Mapping):
        assert list(their) == list(our), f"{where}: theirs has {list(their)}, ours {list(our)}"
        for key in their:
            same(f"{where}: {key}", their[key], our[key])
    elif isinstance(their, list | tuple):
        assert len(their) == len(our), (
            f"{where}: theirs has {len(their)} ({their!r}), ours {len(our)} ({our!r})"
        )
        for index, (left, right) in enumerate(zip(their, our, strict=True)):
            same(f"{where}[{index}]", left, right)
    elif isinstance(their, Tensor):
        assert their.dtype == our.dtype, f"{where}: theirs is {their.dtype}, ours {our.dtype}"
        assert digest(their) == digest(our), f"{where}: differ by at most {_distance(their, our)}"
    elif type(their).__module__.partition(".")[0] in _WITH_OBJECTS:
        same(where, vars(their), vars(our))
    elif isinstance(their, float) and math.isnan(their):
        assert math.isnan(our), f"{where}: theirs is nan, ours {our!r}"
    else:
        assert their == our, f"{where}: theirs is {their!r}, ours {our!r}"


def _distance(their: Tensor, our: Tensor) -> object:
    return (their - our).abs().max().item() if their.shape == our.shape else (their.shape, our.shape)
