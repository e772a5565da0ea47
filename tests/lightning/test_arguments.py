"""Every argument of `lightning.Trainer` with HFModule and HFDataModule, under both Trainers, by its effect.

One test for each argument, named after it. Grade: exact, against a hand-written LightningModule with the same
argument under lightning.Trainer (plain.py); where sums are taken in another order, to a thousandth.
"""

import inspect
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import trainer as trainer_module
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities import model_registry
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback

import hfbridge
from tests.lightning.plain import (
    DEFAULT_RATE,
    MICRO_BATCHES,
    QUIET,
    RATE,
    ROWS,
    SETTINGS,
    MemoryLogger,
    Run,
    assert_same_run,
    assert_same_weights,
    both_trainers,
    compare,
    logged_steps,
    make_loader,
    make_parts,
    run,
    train_by_hand,
)
from tests.tiny import IGNORED, PadRows, make_dataset, make_model

# Lightning's advice: log less often than there are batches, set max_epochs.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
EVAL_BATCHES = 3
EPOCHS = {"val_check_interval": MICRO_BATCHES}
HALVES = {"val_check_interval": MICRO_BATCHES // 2}  # not Lightning's default, so it is known to be passed


def test_every_argument_has_a_test() -> None:
    parameters = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    tests: dict[str, Any] = {name: globals().get(f"test_{name}") for name in parameters}
    assert [name for name, test in tests.items() if test is None] == []
    for test in tests.values():
        assert both_trainers.mark in test.pytestmark


# Where it runs.


@both_trainers
@pytest.mark.parametrize("form", ["name", "object"])
def test_accelerator(side: str, form: str) -> None:
    class Counting(CPUAccelerator):
        devices: list[Any] = []  # noqa: RUF012

        def setup_device(self, device: torch.device) -> None:
            self.devices.append(device)
            super().setup_device(device)

    accelerator: Any = "cpu" if form == "name" else Counting()
    Counting.devices.clear()
    ours, theirs = (run(of, {"use_cpu": None}, accelerator=accelerator) for of in (side, "reference"))
    assert_same_run(ours, theirs)
    assert type(ours.trainer.accelerator) is (CPUAccelerator if form == "name" else Counting)
    assert ours.module.device.type == "cpu"
    assert len(Counting.devices) == (0 if form == "name" else 2)


@both_trainers
def test_strategy(side: str) -> None:
    class Counting(SingleDeviceStrategy):
        steps = 0

        def training_step(self, *step: Any, **named: Any) -> Any:
            self.steps += 1
            return super().training_step(*step, **named)

    strategies = [Counting(torch.device("cpu")) for _ in range(2)]
    ours, theirs = (
        run(of, strategy=strategy) for of, strategy in zip((side, "reference"), strategies, strict=True)
    )
    assert_same_run(ours, theirs)
    assert ours.trainer.strategy is strategies[0]
    assert [strategy.steps for strategy in strategies] == [2 * MICRO_BATCHES] * 2


class Wrapped(pl.Callback):
    """Note by what the strategy has wrapped the module."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.name = type(trainer.strategy.model).__name__


@both_trainers
def test_strategy_by_name(side: str) -> None:
    wrapped = Wrapped()
    ours = run(side, strategy="ddp", devices=1, callbacks=[wrapped])
    assert wrapped.name == "DistributedDataParallel"
    assert isinstance(ours.trainer.strategy, DDPStrategy)
    assert_same_run(ours, run("reference"))


class OfRank(pl.Callback):
    """Write what a rank has trained on into a file; the ranks are processes of their own."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trace = next(cb for cb in trainer.callbacks if hasattr(cb, "trained"))
        content = {"trained": trace.trained, "rates": trace.rates, "epochs": trace.epochs}
        Path(f"rank-{trainer.global_rank}.json").write_text(json.dumps(content))


@both_trainers
@pytest.mark.distributed
def test_devices(side: str) -> None:
    def fork() -> DDPStrategy:
        return DDPStrategy(start_method="fork", process_group_backend="gloo")

    found = {}
    for of in (side, "reference"):
        parts = run(of, devices=2, strategy=fork(), callbacks=[OfRank()])
        assert (parts.trainer.num_devices, parts.trainer.world_size) == (2, 2)
        found[of] = [json.loads(Path(f"rank-{rank}.json").read_text()) for rank in range(2)]
    everything = sorted(total for batch in make_loader(ROWS) for total in batch["input_ids"].sum(1).tolist())
    for ranks in found.values():
        assert [rank["epochs"] for rank in ranks] == [[3, 6]] * 2
        assert [len(rank["trained"]) for rank in ranks] == [6] * 2
        first_epoch = [total for rank in ranks for batch in rank["trained"][:3] for total in batch]
        assert sorted(first_epoch) == everything
    assert found[side][0]["rates"] == pytest.approx(found["reference"][0]["rates"])


@both_trainers
def test_num_nodes(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    ours, theirs = (make_parts(of, num_nodes=2, devices=1).trainer for of in (side, "reference"))
    assert (ours.num_nodes, ours.world_size) == (theirs.num_nodes, theirs.world_size) == (2, 2)
    assert isinstance(ours.strategy, DDPStrategy)
    assert ours.strategy.num_nodes == 2
    assert ours.distributed_sampler_kwargs == theirs.distributed_sampler_kwargs
    assert ours.distributed_sampler_kwargs["num_replicas"] == 2
    assert ours.global_rank == theirs.global_rank == 1


# Numbers.


class Numbers(pl.Callback):
    """Note types of numbers and switches of torch inside of the model's forward."""

    def __init__(self) -> None:
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
        self.modes: set[tuple[bool, bool]] = set()
        self.switches: set[tuple[bool, bool, bool, bool]] = set()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.model.classifier.register_forward_hook(self.note)

    def note(self, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        self.dtypes.add((layer.weight.dtype, output.dtype))
        self.modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        self.switches.add(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.benchmark,
                torch.is_anomaly_enabled(),
            )
        )


# fp16 on the CPU: Lightning takes bf16 instead, and warns.
@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'.`")
@pytest.mark.filterwarnings("ignore:`precision=bf16` is supported for historical reasons")
@both_trainers
@pytest.mark.parametrize(
    ("precision", "weights", "logits"),
    [
        ("32-true", torch.float32, torch.float32),
        (32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_precision(side: str, precision: Any, weights: torch.dtype, logits: torch.dtype) -> None:
    numbers = Numbers()
    # The eps of Adam is 0 in fp16: as many steps as the weights survive.
    limits = {"limit_train_batches": 1 if precision == "16-true" else 3}
    ours, theirs = (
        run(of, {"num_train_epochs": 1}, precision=precision, callbacks=[callback], **limits)
        for of, callback in ((side, numbers), ("reference", Numbers()))
    )
    assert numbers.dtypes == {(weights, logits)}
    assert {value.dtype for value in ours.weights.values() if value.is_floating_point()} == {weights}
    assert_same_run(ours, theirs, weights=False)
    if weights in (torch.float32, torch.float64) and logits is weights:
        assert_same_weights(ours.weights, theirs.weights)
    else:  # half precision rounds where the HF Trainer casts
        start = make_model("distilbert", dropout=0.0).state_dict()
        assert any(not torch.equal(ours.weights[name], start[name].to(weights)) for name in start)
    assert torch.get_default_dtype() is torch.float32


@both_trainers
@pytest.mark.parametrize("deterministic", [True, "warn", False])
def test_deterministic(side: str, deterministic: Any) -> None:
    numbers = Numbers()
    ours = run(side, deterministic=deterministic, callbacks=[numbers])
    assert {seen[:2] for seen in numbers.switches} == {(bool(deterministic), deterministic == "warn")}
    assert_same_run(ours, run("reference", deterministic=deterministic))


@both_trainers
@pytest.mark.parametrize("benchmark", [True, False])
def test_benchmark(side: str, benchmark: bool) -> None:
    torch.backends.cudnn.benchmark = not benchmark
    numbers = Numbers()
    run(side, benchmark=benchmark, callbacks=[numbers])
    assert {seen[2] for seen in numbers.switches} == {benchmark}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in SqrtBackward0")
@both_trainers
def test_detect_anomaly(side: str) -> None:
    numbers = Numbers()
    ours = run(side, detect_anomaly=True, limit_train_batches=1, callbacks=[numbers])
    assert_same_run(ours, run("reference", limit_train_batches=1))
    assert {seen[3] for seen in numbers.switches} == {True}

    def fit_with_broken_gradients(detects: bool) -> Any:
        model: Any = make_model("distilbert", dropout=0.0)
        model.classifier.register_forward_hook(lambda layer, inputs, output: output + (output * 0).sqrt())
        return run(side, model=model, detect_anomaly=detects, limit_train_batches=1)

    with pytest.raises(RuntimeError, match="returned nan values"):
        fit_with_broken_gradients(True)
    assert fit_with_broken_gradients(False).weights["classifier.weight"].isnan().all()


@both_trainers
@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode(side: str, inference_mode: bool) -> None:
    for verb in ("validate", "test", "predict"):
        seen = []
        for of in (side, "reference"):
            numbers = Numbers()
            parts = make_parts(of, inference_mode=inference_mode, limit_val_batches=1.0, callbacks=[numbers])
            getattr(parts.trainer, verb)(parts.module, datamodule=parts.data)
            seen.append(numbers.modes)
        assert seen == [{(False, inference_mode)}] * 2, verb


class Gradients(pl.Callback):
    """Note the gradients with which each step is taken: their 2-norm and the largest value."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self.note)

    def note(self, optimizer: Any, *step: Any) -> None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        self.largest.append(max(float(gradient.abs().max()) for gradient in gradients))


def run_with_gradients(side: str, *, exactly: bool = True, **options: Any) -> tuple[Run, Run, Gradients]:
    """Run a side and the reference, compare them, and return the side's gradients, too.

    A norm is summed up in the order of the model's parameters, or in that of the optimizer's.
    """
    ours, theirs = Gradients(), Gradients()
    runs = [
        run(of, {"max_grad_norm": None}, callbacks=[seen], **options)
        for of, seen in ((side, ours), ("reference", theirs))
    ]
    assert_same_run(*runs, exactly=exactly)
    assert len(ours.norms) == 2 * MICRO_BATCHES
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-6 if exactly else 1e-3)
    assert ours.largest == pytest.approx(theirs.largest, rel=1e-6 if exactly else 1e-3)
    return runs[0], runs[1], ours


@both_trainers
@pytest.mark.parametrize("limit", [0.01, 100])
def test_gradient_clip_val(side: str, limit: float) -> None:
    ours, _, gradients = run_with_gradients(side, exactly=limit > 1, gradient_clip_val=limit)
    assert ours.trainer.gradient_clip_val == limit
    if limit < 1:
        assert gradients.norms == pytest.approx([limit] * len(gradients.norms), rel=1e-3)
    else:
        assert min(gradients.norms) > 0.01


@both_trainers
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clip_algorithm(side: str, algorithm: str) -> None:
    limit = 1e-3
    _, _, gradients = run_with_gradients(
        side,
        exactly=algorithm == "value",
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    if algorithm == "norm":
        assert max(gradients.norms) == pytest.approx(limit, rel=2e-3)
    else:
        assert max(gradients.largest) == pytest.approx(limit)
        assert min(gradients.norms) > 2 * limit


# How long.


@both_trainers
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_max_epochs(side: str, epochs: int) -> None:
    ours, _ = compare(side, {"num_train_epochs": None}, max_epochs=epochs)
    assert ours.trainer.global_step == len(ours.trace.rates) == epochs * MICRO_BATCHES
    total = epochs * MICRO_BATCHES
    assert ours.trace.rates == pytest.approx([RATE * (1 - step / total) for step in range(total)])


class Stop(pl.Callback):
    """Stop training at the first micro-batch."""

    def on_train_batch_start(self, trainer: Any, *hook: Any) -> None:
        trainer.should_stop = True


@both_trainers
@pytest.mark.parametrize(("epochs", "steps"), [(None, 1), (2, 2 * MICRO_BATCHES)])
def test_min_epochs(side: str, epochs: int | None, steps: int) -> None:
    settings = {"num_train_epochs": 3}
    ours, theirs = (run(of, settings, min_epochs=epochs, callbacks=[Stop()]) for of in (side, "reference"))
    assert_same_run(ours, theirs)
    assert ours.trainer.global_step == steps


@both_trainers
@pytest.mark.parametrize("options", [{"max_steps": 4}, {"max_steps": 8}, {"max_steps": 20, "max_epochs": 2}])
def test_max_steps(side: str, options: dict[str, int]) -> None:
    ours, _ = compare(side, {"num_train_epochs": None}, **options)
    total = min(options["max_steps"], 2 * MICRO_BATCHES)
    assert ours.trainer.global_step == total
    assert ours.trace.rates == pytest.approx([RATE * (1 - step / total) for step in range(total)])


@both_trainers
@pytest.mark.parametrize(("minimum", "steps"), [(None, 1), (4, 6), (8, 8)])
def test_min_steps(side: str, minimum: int | None, steps: int) -> None:
    # With min_steps alone, Lightning takes min_epochs=1.
    ours, theirs = (run(of, min_steps=minimum, callbacks=[Stop()]) for of in (side, "reference"))
    assert_same_run(ours, theirs)
    assert ours.trainer.global_step == steps


@both_trainers
@pytest.mark.parametrize("form", [timedelta(minutes=5), "00:00:05:00", {"minutes": 5}], ids=str)
def test_max_time(side: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(pl.Callback):
        seconds = 0.0

        def on_train_batch_start(self, *hook: Any) -> None:
            Clock.seconds += 100

    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: Clock.seconds))
    ours, theirs = (run(of, max_time=form, callbacks=[Clock()]) for of in (side, "reference"))
    assert_same_run(ours, theirs)
    assert ours.trainer.global_step == 3


@both_trainers
@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run(side: str, batches: Any) -> None:
    ours, theirs = compare(side, {"num_train_epochs": None}, fast_dev_run=batches, quiet=False)
    assert len(ours.trace.trained) == ours.trainer.global_step == int(batches)
    assert ours.trace.validated == [[int(batches), min(int(batches), EVAL_BATCHES)]]
    assert not any(path.is_file() for path in Path().rglob("*"))
    for parts in (ours, theirs):
        parts.trainer.test(parts.module, datamodule=parts.data, verbose=False)
        parts.trainer.predict(parts.module, datamodule=parts.data)
        assert parts.trace.tested == parts.trace.predicted == min(int(batches), EVAL_BATCHES)


@both_trainers
def test_fast_dev_run_counts_micro_batches(side: str) -> None:
    settings = {"num_train_epochs": None, "gradient_accumulation_steps": 2}
    # Exact normalization takes the short step's mean over its one micro-batch, Lightning half of it.
    ours, _ = compare(side, settings, fast_dev_run=3, weights=False)
    assert (len(ours.trace.trained), ours.trainer.global_step) == (3, 2)
    assert ours.trace.rates == pytest.approx([RATE, RATE / 2])


# How much data.


@both_trainers
@pytest.mark.parametrize(
    ("limit", "batches"), [(4, 4), (0.5, 3), (1.0, MICRO_BATCHES), (50, MICRO_BATCHES), (0, 0)]
)
def test_limit_train_batches(side: str, limit: Any, batches: int) -> None:
    ours, _ = compare(side, limit_train_batches=limit)
    assert len(ours.trace.trained) == ours.trainer.global_step == 2 * batches
    assert ours.trace.trained[:batches] == ours.trace.trained[batches:]
    total = 2 * batches
    assert ours.trace.rates == pytest.approx([RATE * (1 - step / total) for step in range(total)])


@both_trainers
@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.4, 1), (0, 0)])
def test_limit_val_batches(side: str, limit: Any, batches: int) -> None:
    ours, _ = compare(side, limit_val_batches=limit, **HALVES)
    assert ours.trace.validated == (
        [[3, batches], [6, batches], [9, batches], [12, batches]] if batches else []
    )
    parts = [make_parts(of, limit_val_batches=limit) for of in (side, "reference")]
    found = [part.trainer.validate(part.module, datamodule=part.data, verbose=False) for part in parts]
    assert sum(count for _, count in parts[0].trace.validated) == batches
    if batches:
        assert found[0][0]["eval_loss"] == pytest.approx(found[1][0]["eval_loss"], rel=1e-5)


@both_trainers
@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.4, 1), (1.0, EVAL_BATCHES)])
def test_limit_test_batches(side: str, limit: Any, batches: int) -> None:
    parts = [make_parts(of, limit_test_batches=limit) for of in (side, "reference")]
    found = [part.trainer.test(part.module, datamodule=part.data, verbose=False) for part in parts]
    assert [part.trace.tested for part in parts] == [batches] * 2
    assert found[0][0]["test_loss"] == pytest.approx(found[1][0]["test_loss"], rel=1e-5)


@both_trainers
@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.4, 1), (1.0, EVAL_BATCHES)])
def test_limit_predict_batches(side: str, limit: Any, batches: int) -> None:
    parts = [make_parts(of, limit_predict_batches=limit) for of in (side, "reference")]
    ours, theirs = (part.trainer.predict(part.module, datamodule=part.data) for part in parts)
    assert len(ours) == len(theirs) == batches
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


# Lightning: to overfit, it turns shuffling off.
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@both_trainers
@pytest.mark.parametrize(("overfit", "train", "val"), [(2, 2, 2), (0.5, 3, 1)])
def test_overfit_batches(side: str, overfit: Any, train: int, val: int) -> None:
    settings = {"train_sampling_strategy": None}  # which shuffles
    ours, _ = compare(
        side, settings, plain_data={"shuffle": True}, overfit_batches=overfit, val_check_interval=train
    )
    in_order = [batch["input_ids"].sum(1).tolist() for batch in make_loader(ROWS)]
    assert ours.trace.trained == in_order[:train] * 2
    assert ours.trace.validated == [[train, val], [2 * train, val]]


# When it validates.


@both_trainers
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"val_check_interval": 3}, [3, 6, 9, 12]),
        ({"val_check_interval": 4}, [4, 10]),
        ({"val_check_interval": 0.5}, [3, 6, 9, 12]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10]),
        ({"val_check_interval": timedelta(0)}, list(range(1, 13))),
        ({"val_check_interval": "01:00:00:00"}, []),
        ({"val_check_interval": {"days": 1}}, []),
    ],
    ids=str,
)
def test_val_check_interval(side: str, options: dict[str, Any], steps: list[int]) -> None:
    ours, _ = compare(side, **options)
    assert ours.trace.validated == [[step, EVAL_BATCHES] for step in steps]
    assert logged_steps(ours, "eval_loss") == steps


@both_trainers
def test_val_check_interval_counts_micro_batches(side: str) -> None:
    ours, _ = compare(side, {"gradient_accumulation_steps": 2}, val_check_interval=2, exactly=False)
    assert ours.trace.validated == [[step, EVAL_BATCHES] for step in range(1, 7)]


@both_trainers
@pytest.mark.parametrize("every", [2, 3])
def test_check_val_every_n_epoch(side: str, every: int) -> None:
    ours, _ = compare(side, {"num_train_epochs": 4}, check_val_every_n_epoch=every)
    assert ours.trace.validated == [[epoch * MICRO_BATCHES, EVAL_BATCHES] for epoch in range(every, 5, every)]


def test_check_val_every_n_epoch_at_lightnings_default() -> None:
    # Only hfbridge.Trainer sees that it was passed.
    ours, _ = compare("hfbridge", check_val_every_n_epoch=1)
    assert ours.trace.validated == [[6, EVAL_BATCHES], [12, EVAL_BATCHES]]


@both_trainers
@pytest.mark.parametrize(("steps", "batches"), [(0, 0), (1, 1), (-1, EVAL_BATCHES)])
def test_num_sanity_val_steps(side: str, steps: int, batches: int) -> None:
    ours, _ = compare(side, num_sanity_val_steps=steps, **HALVES)
    assert ours.trace.sanity == batches
    assert len(ours.trace.validated) == 4
    assert 0 not in logged_steps(ours, "eval_loss")


@both_trainers
def test_a_sanity_check_leaves_random_states_alone(side: str) -> None:
    def fit(steps: int) -> Any:
        model = make_model("distilbert", dropout=0.3)
        settings = {"train_sampling_strategy": None}
        return run(side, settings, model=model, num_sanity_val_steps=steps, **HALVES)

    checked, unchecked = fit(2), fit(0)
    assert (checked.trace.sanity, unchecked.trace.sanity) == (2, 0)
    assert_same_weights(checked.weights, unchecked.weights)
    assert checked.trace.trained == unchecked.trace.trained


@both_trainers
@pytest.mark.parametrize(("every", "calls"), [(0, 1), (1, 3), (2, 2)])
def test_reload_dataloaders_every_n_epochs(side: str, every: int, calls: int) -> None:
    def fit(of: str) -> tuple[Any, list[str]]:
        made: list[str] = []

        def counting(base: Any) -> Any:
            class Counting(base):  # type: ignore[misc]
                def train_dataloader(self) -> Any:
                    made.append("train")
                    return super().train_dataloader()

                def val_dataloader(self) -> Any:
                    made.append("val")
                    return super().val_dataloader()

            return Counting

        options: dict[str, Any] = {"reload_dataloaders_every_n_epochs": every, **EPOCHS}
        return run(of, {"num_train_epochs": 3}, data_class=counting, **options), made

    (ours, made), (theirs, expected) = fit(side), fit("reference")
    assert_same_run(ours, theirs)
    assert made.count("train") == expected.count("train") == calls
    assert made.count("val") == expected.count("val") == calls


class Backwards(Sampler[int]):
    """Take the examples from the last to the first."""

    def __iter__(self) -> Any:
        return iter(range(ROWS - 1, -1, -1))

    def __len__(self) -> int:
        return ROWS


@both_trainers
@pytest.mark.parametrize("replaces", [True, False])
def test_use_distributed_sampler(side: str, replaces: bool) -> None:
    def fit(of: str) -> Any:
        parts = make_parts(of, strategy="ddp", devices=1, use_distributed_sampler=replaces)
        parts.trainer.fit(parts.module, make_loader(ROWS, sampler=Backwards()))
        return parts

    ours, theirs = fit(side), fit("reference")
    assert_same_run(ours, theirs)
    backwards = [batch["input_ids"].sum(1).tolist() for batch in make_loader(ROWS, sampler=Backwards())]
    # DistributedSampler shuffles what any sampler but a sequential one gives.
    assert (ours.trace.trained[:MICRO_BATCHES] == backwards) is not replaces


# Steps.


@both_trainers
def test_accumulate_grad_batches(side: str) -> None:
    ours, _ = compare(side, accumulate_grad_batches=3, exactly=False)
    assert (len(ours.trace.trained), ours.trainer.global_step) == (12, 4)
    assert ours.trainer.accumulate_grad_batches == 3
    assert ours.trace.rates == pytest.approx([RATE, 0.75 * RATE, 0.5 * RATE, 0.25 * RATE])


def count_examples(batch: Any) -> int:
    """Count what the loss of a sequence classifier is the mean over."""
    return len(batch["labels"])


def count_tokens(batch: Any) -> int:
    """Count what the loss of a causal language model is the mean over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@both_trainers
@pytest.mark.parametrize(("kind", "count"), [("distilbert", count_examples), ("llama", count_tokens)])
def test_epochs_schedule_and_logs_follow_from_the_batches_that_are_left(
    side: str, kind: str, count: Callable[[Any], int]
) -> None:
    counters = []

    class Counter(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, *hook: Any) -> None:
            counters.append(trainer.fit_loop.epoch_loop.batch_idx)

    dataset = make_dataset(kind, 30)
    settings = {"warmup_steps": 0.5, "logging_steps": 0.5}
    parts = make_parts(
        side,
        settings,
        model=make_model(kind, dropout=0.0),
        accumulate_grad_batches=3,
        limit_train_batches=5,
        callbacks=[Counter()],
        **({} if side == "hfbridge" else {"log_every_n_steps": None}),
    )
    data = hfbridge.HFDataModule(train_dataset=dataset, data_collator=PadRows())
    parts.trainer.fit(parts.module, datamodule=data)
    batches = [PadRows()([dataset[i] for i in range(first, first + 4)]) for first in range(0, 20, 4)]
    assert parts.trace.trained == [batch["input_ids"].sum(1).tolist() for batch in batches] * 2
    assert counters == [2, 4] * 2  # steps of three and of two micro-batches
    assert parts.trainer.global_step == 4
    assert parts.trace.epochs == [2, 4]
    assert parts.trace.rates == pytest.approx([0, RATE / 2, RATE, RATE / 2])
    assert parts.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0, 0]
    assert logged_steps(parts, "loss") == [2, 4]
    assert [entry["epoch"] for entry in parts.module.log_history if "loss" in entry] == [1.0, 2.0]
    by_hand = make_model(kind, dropout=0.0)
    train_by_hand(by_hand, [batches[:3], batches[3:]] * 2, count, warmup=2)
    assert_same_weights(parts.weights, by_hand.state_dict(), exactly=False)


# What is written.


@both_trainers
def test_logger(side: str) -> None:
    found, expected = MemoryLogger(), MemoryLogger()
    ours, theirs = (
        run(of, logger=logger, log_every_n_steps=1, **HALVES)
        for of, logger in ((side, found), ("reference", expected))
    )
    assert_same_run(ours, theirs)
    for name in ("loss", "eval_loss"):
        assert found.values(name) == pytest.approx(expected.values(name), rel=1e-5)
    assert len(found.values("loss")) == 12
    assert len(found.values("eval_loss")) == 4
    assert found.values("learning_rate") == pytest.approx(ours.trace.rates)


@both_trainers
@pytest.mark.parametrize("form", [True, False, "several"])
def test_logger_in_other_forms(side: str, form: Any) -> None:
    loggers: Any = [CSVLogger("first"), MemoryLogger()] if form == "several" else form
    parts = run(side, {"output_dir": None}, logger=loggers, default_root_dir="root")
    files = {path.relative_to(".").parts[0] for path in Path().rglob("*") if path.is_file()}
    if form == "several":
        assert parts.trainer.loggers == loggers
        assert Path("first/lightning_logs/version_0/metrics.csv").is_file()
        assert len(loggers[1].values("loss")) == 12
    else:
        assert len(parts.trainer.loggers) == int(form)
        assert ("root" in files) is form
        assert Path("root/lightning_logs/version_0").is_dir() is form


@both_trainers
@pytest.mark.parametrize("every", [1, 2, 5])
def test_log_every_n_steps(side: str, every: int) -> None:
    found, expected = MemoryLogger(), MemoryLogger()
    ours, theirs = (
        run(of, {"logging_steps": None}, logger=logger, log_every_n_steps=every)
        for of, logger in ((side, found), ("reference", expected))
    )
    assert_same_run(ours, theirs)
    steps = list(range(every, 13, every))
    assert len(found.values("loss")) == len(expected.values("loss")) == len(steps)
    assert ours.trainer.log_every_n_steps == every
    assert logged_steps(ours, "loss") == steps


HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)


def make_recorder(calls: list[str]) -> pl.Callback:
    """Make a callback that notes its hooks."""

    def note(name: str) -> Callable[..., None]:
        return lambda *hook: calls.append(name)

    recorder: pl.Callback = type("Recorder", (pl.Callback,), {name: note(name) for name in HOOKS})()
    return recorder


@both_trainers
@pytest.mark.parametrize("form", ["one", "list"])
def test_callbacks(side: str, form: str) -> None:
    class CountSteps(TrainerCallback):
        steps = 0

        def on_step_end(self, *event: Any, **named: Any) -> None:
            CountSteps.steps += 1

    found: list[str] = []
    expected: list[str] = []
    for of, calls in ((side, found), ("reference", expected)):
        parts = make_parts(of)  # whose Trainer has other callbacks
        given: Any = make_recorder(calls)
        if form == "list":
            given = [given, *([CountSteps] if of == "hfbridge" else [])]
        options: dict[str, Any] = {"accumulate_grad_batches": 3, "callbacks": given, **QUIET}
        if of == "hfbridge":
            trainer: Any = hfbridge.Trainer(SETTINGS, **options)
        else:
            options |= {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0}
            trainer = pl.Trainer(**options, limit_val_batches=0)
        trainer.fit(parts.module, datamodule=parts.data)
    assert found == expected
    assert (found.count("on_train_batch_end"), found.count("on_before_optimizer_step")) == (12, 4)
    assert CountSteps.steps == (4 if form == "list" and side == "hfbridge" else 0)


@both_trainers
@pytest.mark.parametrize("enabled", [True, False])
def test_enable_checkpointing(side: str, enabled: bool) -> None:
    ours, theirs = (
        run(of, {"output_dir": None}, enable_checkpointing=enabled, default_root_dir=root)
        for of, root in ((side, "ours"), ("reference", "theirs"))
    )
    assert_same_run(ours, theirs)
    found, expected = (
        {str(path.relative_to(root)) for path in Path(root).rglob("*.ckpt")} for root in ("ours", "theirs")
    )
    assert found == expected == ({"checkpoints/epoch=1-step=12.ckpt"} if enabled else set())
    for name in found:
        checkpoint = torch.load(Path("ours") / name, weights_only=False)
        assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 12)
        weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
        assert_same_weights(weights, ours.weights)


@both_trainers
@pytest.mark.parametrize("enabled", [True, False])
def test_enable_progress_bar(side: str, enabled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    parts = run(side, enable_progress_bar=enabled)
    assert isinstance(parts.trainer.progress_bar_callback, ProgressBar) is enabled
    captured = capsys.readouterr()
    assert ("Epoch" in captured.out + captured.err) is enabled


@both_trainers
@pytest.mark.parametrize("enabled", [True, False])
def test_enable_model_summary(side: str, enabled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    parts = run(side, enable_model_summary=enabled)
    assert any(isinstance(callback, ModelSummary) for callback in parts.trainer.callbacks) is enabled
    captured = capsys.readouterr()
    assert ("Trainable params" in captured.out + captured.err) is enabled


@both_trainers
def test_default_root_dir(side: str) -> None:
    roots = [Path("roots") / name for name in ("ours", "theirs")]
    options: dict[str, Any] = {"logger": True, "enable_checkpointing": True}
    ours, theirs = (
        run(of, {"output_dir": None}, default_root_dir=root, **options)
        for of, root in zip((side, "reference"), roots, strict=True)
    )
    assert_same_run(ours, theirs)
    assert Path(ours.trainer.default_root_dir) == roots[0]
    for root in roots:
        assert (root / "lightning_logs/version_0/checkpoints/epoch=1-step=12.ckpt").is_file()
    assert {path.name for path in Path().iterdir()} == {"roots"}


@both_trainers
def test_model_registry(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's client is imitated: it puts a checkpoint where Lightning has it put one."""
    downloads: list[str] = []

    def download_model(name: str, download_dir: str) -> list[str]:
        downloads.append(name)
        trained.trainer.save_checkpoint(Path(download_dir) / "last.ckpt")
        return ["last.ckpt"]

    client: Any = ModuleType("litmodels")
    client.download_model = download_model
    monkeypatch.setitem(sys.modules, "litmodels", client)
    for module in (trainer_module, checkpoint_connector, model_registry):
        monkeypatch.setattr(module, "module_available", lambda name: True)
    trained = run(side)
    parts = make_parts(side, {"output_dir": None}, default_root_dir="root", model_registry="team/tiny:v1")
    parts.trainer.predict(parts.module, datamodule=parts.data, ckpt_path="registry")
    assert downloads == ["team/tiny"]
    assert Path("root/team_tiny/last.ckpt").is_file()
    assert_same_weights(parts.weights, trained.weights)


@both_trainers
@pytest.mark.parametrize("enabled", [True, False])
def test_enable_autolog_hparams(side: str, enabled: bool) -> None:
    logger = MemoryLogger()
    run(side, logger=logger, enable_autolog_hparams=enabled)
    assert bool(logger.hparams) is enabled


# Looking inside.


@both_trainers
def test_profiler(side: str) -> None:
    def counts(of: str) -> dict[str, int]:
        durations = run(of, profiler="simple").trainer.profiler.recorded_durations
        kept = ("run_training_epoch", "run_training_batch", ".training_step", ".backward")
        return {
            name.split(".")[-1]: len(seconds)
            for name, seconds in durations.items()
            if name.endswith(kept) and "Callback" not in name and "LightningModule" not in name
        }

    found, expected = counts(side), counts("reference")
    assert found == expected
    assert expected["run_training_batch"] == expected["training_step"] == expected["backward"] == 12
    assert expected["run_training_epoch"] == 2


# PlainModule logs, which does nothing here, as Lightning says.
@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")
@both_trainers
def test_barebones(side: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = run(side, has_settings=False, quiet=False, barebones=True, max_epochs=2)
    trainer = parts.trainer
    assert trainer.loggers == trainer.checkpoint_callbacks == []
    assert trainer.progress_bar_callback is None
    assert not any(isinstance(callback, ModelSummary) for callback in trainer.callbacks)
    assert trainer.logged_metrics == {}
    assert parts.trace.sanity == 0
    assert parts.trainer.global_step == 12
    assert parts.trace.validated == [[6, EVAL_BATCHES], [12, EVAL_BATCHES]]
    assert not any(path.is_file() for path in Path().rglob("*"))
    assert "Epoch" not in capsys.readouterr().out
    replayed = run(
        "reference", has_settings=False, max_epochs=2, plain_data={"train": parts.trace.batches[:6]}
    )
    assert parts.trace.rates == pytest.approx(replayed.trace.rates)


class KeptPaths(TorchCheckpointIO):
    """Keep where checkpoints are written."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.paths.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


@both_trainers
def test_plugins(side: str) -> None:
    numbers, kept = Numbers(), KeptPaths()
    parts = run(
        side,
        plugins=[HalfPrecision("bf16-true"), kept],
        enable_checkpointing=True,
        callbacks=[numbers],
    )
    assert numbers.dtypes == {(torch.bfloat16, torch.bfloat16)}
    assert kept.paths == ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt"]
    assert isinstance(parts.trainer.precision_plugin, HalfPrecision)


@both_trainers
def test_plugins_take_one_without_a_list(side: str) -> None:
    numbers = Numbers()
    run(side, plugins=MixedPrecision("bf16-mixed", "cpu"), callbacks=[numbers])
    assert numbers.dtypes == {(torch.float32, torch.bfloat16)}


@both_trainers
@pytest.mark.parametrize("synchronizes", [True, False])
def test_sync_batchnorm(side: str, synchronizes: bool) -> None:
    """DistributedDataParallel takes the layers that this makes on GPUs only, and says so."""
    model: Any = make_model("distilbert", dropout=0.0)
    model.pre_classifier = nn.Sequential(model.pre_classifier, nn.BatchNorm1d(16))
    options: dict[str, Any] = {"strategy": "ddp", "devices": 1, "sync_batchnorm": synchronizes}
    if synchronizes:
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            run(side, model=model, **options)
    else:
        assert run(side, model=model, **options).trainer.global_step == 12


# No settings at all.


def fit_without_settings(side: str, **arguments: Any) -> Any:
    """Fit with Lightning's defaults for the loop, and transformers' for optimizer and schedule."""
    return run(side, has_settings=False, quiet=False, **arguments)


@both_trainers
def test_without_settings_the_loop_has_lightnings_defaults(
    side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = fit_without_settings(side, max_epochs=2)
    trainer, trace = ours.trainer, ours.trace
    assert len(trainer.loggers) == 1
    assert Path("lightning_logs/version_0").is_dir()
    assert [path.name for path in Path().rglob("*.ckpt")] == ["epoch=1-step=12.ckpt"]
    assert trainer.checkpoint_callback.best_model_path.endswith(
        "lightning_logs/version_0/checkpoints/epoch=1-step=12.ckpt"
    )
    assert trace.sanity == 2
    assert trace.validated == [[6, EVAL_BATCHES], [12, EVAL_BATCHES]]
    assert trainer.log_every_n_steps == 50
    assert isinstance(trainer.progress_bar_callback, ProgressBar)
    assert any(isinstance(callback, ModelSummary) for callback in trainer.callbacks)
    assert trainer.accumulate_grad_batches == 1
    captured = capsys.readouterr()
    assert "Epoch" in captured.out + captured.err
    assert {path.name for path in Path().iterdir()} == {"lightning_logs"}


@both_trainers
def test_without_settings_optimizer_and_schedule_are_the_hf_trainers(side: str) -> None:
    ours = run(side, has_settings=False, max_epochs=2)
    (optimizer,) = ours.trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert ours.trace.rates == pytest.approx([DEFAULT_RATE * (1 - step / 12) for step in range(12)])
    # transformers shuffles: the reference takes the same micro-batches.
    theirs = run("reference", has_settings=False, max_steps=12, plain_data={"train": ours.trace.batches})
    named = [(len(group["params"]), group["weight_decay"], group["eps"]) for group in optimizer.param_groups]
    (other,) = theirs.trainer.optimizers
    assert named == [
        (len(group["params"]), group["weight_decay"], group["eps"]) for group in other.param_groups
    ]
    assert_same_weights(ours.weights, theirs.weights)
    first, second = ours.trace.trained[:6], ours.trace.trained[6:]
    assert sorted(chain(*first)) == sorted(chain(*second))
    assert first != second


@both_trainers
def test_without_settings_and_limits_there_are_a_thousand_epochs(side: str) -> None:
    ours = run(side, has_settings=False, callbacks=[Stop()])
    assert ours.trainer.max_epochs == 1000
    assert ours.trainer.global_step == 1
    (schedule,) = (config.scheduler for config in ours.trainer.lr_scheduler_configs)
    assert schedule.get_last_lr()[0] == pytest.approx(DEFAULT_RATE * (1 - 1 / 6000))


def test_both_trainers_do_the_same_without_settings() -> None:
    ours, theirs = (run(side, has_settings=False, max_epochs=2) for side in ("hfbridge", "lightning"))
    assert_same_run(ours, theirs)


# Arguments and settings together.

CONFLICTS = [
    ({"max_steps": 4}, {"max_steps": 10}, "`max_steps=4` conflicts with `max_steps=10`"),
    ({"max_epochs": 5}, {}, "`max_epochs=5` conflicts with `num_train_epochs=2`"),
    (
        {"accumulate_grad_batches": 2},
        {"gradient_accumulation_steps": 4},
        "`accumulate_grad_batches=2` conflicts with `gradient_accumulation_steps=4`",
    ),
    (
        {"gradient_clip_val": 0.5},
        {"max_grad_norm": 2.0},
        "`gradient_clip_val=0.5` conflicts with `max_grad_norm=2.0`",
    ),
    ({"log_every_n_steps": 7}, {}, "`log_every_n_steps=7` conflicts with `logging_steps=1`"),
]


@both_trainers
@pytest.mark.parametrize(("arguments", "settings", "text"), CONFLICTS, ids=str)
def test_one_thing_with_two_values_is_an_error(
    side: str, arguments: dict[str, Any], settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(hfbridge.SettingsError) as caught:
        run(side, settings, **arguments)
    message = " ".join(str(caught.value).split())  # an error of several lines is wrapped
    assert f"{text} in the settings; set only one" in message
    assert message.count("conflicts with") == 1


@both_trainers
@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"max_steps": 4}, {"max_steps": -1}),
        ({"max_steps": 4}, {"max_steps": 4}),
        ({"max_steps": 4, "accumulate_grad_batches": 1}, {"gradient_accumulation_steps": 1}),
    ],
    ids=str,
)
def test_a_default_or_the_same_value_is_no_conflict(
    side: str, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    ours = run(side, {"num_train_epochs": None, **settings}, **arguments)
    theirs = run("reference", {"num_train_epochs": None}, **arguments)
    assert_same_run(ours, theirs)
    assert ours.trainer.global_step == 4


@both_trainers
def test_settings_alone_have_transformers_meaning(side: str) -> None:
    """What is neither an argument nor a setting has transformers' default: no validation, no checkpoint."""
    ours = run(side)
    assert ours.trace.validated == []
    assert ours.trace.sanity == 0
    assert ours.trainer.loggers == ours.trainer.checkpoint_callbacks == []
    assert logged_steps(ours, "loss") == list(range(1, 13))
