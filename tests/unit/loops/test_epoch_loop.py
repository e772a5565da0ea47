"""The short step beside Lightning's own loop: the same bits, rows, counters, files and hooks."""

import functools
import inspect
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, ModelHooks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader, _MaxSizeCycle
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from transformers import TrainerCallback

import hfbridge
from hfbridge.loops.epoch_loop import LeanEpochLoop, LeanStep, lightning_handles_sigterm
from hfbridge.strategies import DDPStrategy
from tests.tiny import PadRows, make_dataset, make_model

# Lightning tells whose batch hook counts where module and data module have one each.
pytestmark = pytest.mark.filterwarnings("ignore:You have overridden `\\w+` in")

TRAIN, EVALUATION = make_dataset("distilbert", 46), make_dataset("distilbert", 6, seed=5)
SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_strategy": "no",
}
SHORT = {**SETTINGS, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}


class Inside(pl.Callback):
    """Has a hook inside a step, so that Lightning's own loop runs."""

    def on_before_optimizer_step(self, *hook: Any) -> None:
        """Do nothing."""


class Diary(pl.Callback):
    """Note, at the beginning and end of each step, what a callback can see of the run."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _note(self, trainer: Any, batch_idx: int) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        self.seen.append(
            (
                batch_idx,
                trainer.global_step,
                trainer.current_epoch,
                trainer.is_last_batch,
                epoch_loop._batches_that_stepped,
                epoch_loop.total_batch_idx,
                trainer.lightning_module._current_fx_name,
                trainer.fit_loop.state_dict(),
                plain(dict(trainer.callback_metrics)),
            )
        )

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Note the beginning."""
        self._note(trainer, batch_idx)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the end."""
        self._note(trainer, batch_idx)
        self.seen.append((float(outputs["loss"]), not outputs["loss"].requires_grad))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the optimizer steps that were taken the short way."""
    count, take = [0], LeanStep.take

    def counted(self: LeanStep) -> int:
        steps = take(self)
        count[0] += steps
        return steps

    monkeypatch.setattr(LeanStep, "take", counted)
    return count


def prepare(
    *callbacks: Any,
    kind: type[hfbridge.HFModule] = hfbridge.HFModule,
    data_kind: type[hfbridge.HFDataModule] = hfbridge.HFDataModule,
    settings: dict[str, Any] = SETTINGS,
    **arguments: Any,
) -> tuple[hfbridge.Trainer, hfbridge.HFModule, hfbridge.HFDataModule]:
    """Make a run."""
    module = kind(make_model("distilbert"))
    arguments = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **arguments}
    trainer = hfbridge.Trainer(settings, callbacks=list(callbacks), **arguments)
    data = data_kind(train_dataset=TRAIN, eval_dataset=EVALUATION, data_collator=PadRows())
    return trainer, module, data


def fit(*callbacks: Any, **arguments: Any) -> tuple[hfbridge.Trainer, hfbridge.HFModule]:
    """Make a run, and run it."""
    trainer, module, data = prepare(*callbacks, **arguments)
    trainer.fit(module, data)
    return trainer, module


def plain(value: Any) -> Any:
    """Make nested containers comparable: tensors as lists, without times."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items() if not str(name).endswith(("runtime", "_second"))}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def left(trainer: hfbridge.Trainer, module: hfbridge.HFModule) -> dict[str, Any]:
    """What a run leaves behind."""
    return {
        "rows": plain(trainer.log_history),
        "weights": plain(dict(module.model.state_dict())),
        "optimizer": plain(trainer.optimizers[0].state_dict()),
        "schedule": plain(module.schedule.state_dict()),
        "loops": trainer.fit_loop.state_dict(),
        "random": torch.get_rng_state().tolist(),
        "logged": plain(dict(trainer.callback_metrics)),
        "stopped": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
    }


class Stops(TrainerCallback):
    """Ask for an end in one of the events of step 4 or of its micro-batches."""

    def __init__(self, event: str, flag: str) -> None:
        def ask(args: Any, state: Any, control: Any, **parts: Any) -> Any:
            setattr(control, flag, state.global_step in (3, 4))
            return control

        setattr(self, event, ask)


class Logs(pl.Callback):
    """Use `self.log` as a callback may."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *batch: Any) -> None:
        """Log something every other step."""
        if trainer.global_step % 2 == 0:
            module.log("now", outputs["loss"] * 2, on_step=True, on_epoch=True, batch_size=3)


class StopsEarly(pl.Callback):
    """Set Lightning's flag."""

    def on_train_batch_end(self, trainer: Any, *hook: Any) -> None:
        """Stop at step 5."""
        trainer.should_stop = trainer.global_step == 5


class Joins(pl.Callback):
    """Attach a callback with a hook inside the step, in the middle of an epoch."""

    def on_train_batch_end(self, trainer: Any, *hook: Any) -> None:
        """Attach it at step 2."""
        if trainer.global_step == 2:
            trainer.callbacks.append(Inside())


@pytest.mark.parametrize(
    ("settings", "make", "least"),
    [
        pytest.param({"eval_strategy": "steps", "eval_steps": 3}, list, 12, id="evaluations"),
        pytest.param({"max_steps": 8, "lr_scheduler_type": "cosine"}, list, 8, id="max_steps"),
        pytest.param({"max_grad_norm": 0.0, "bf16": True}, list, 12, id="unclipped"),
        pytest.param({}, lambda: [Stops("on_step_end", "should_training_stop")], 3, id="ends-run"),
        pytest.param({}, lambda: [Stops("on_step_end", "should_epoch_stop")], 4, id="ends-epoch"),
        pytest.param({}, lambda: [Stops("on_substep_end", "should_epoch_stop")], 3, id="ends-in-window"),
        pytest.param({}, lambda: [Logs()], 12, id="self.log"),
        pytest.param({}, lambda: [StopsEarly()], 5, id="should_stop"),
        pytest.param({}, lambda: [Joins()], 2, id="joins"),
        pytest.param(
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "save_strategy": "epoch"}
            | {"metric_for_best_model": "loss"},
            list,
            12,
            id="plateau",
        ),
    ],
)
def test_the_same_run(
    settings: dict[str, Any], make: Callable[[], list[Any]], least: int, taken: list[int], tmp_path: Path
) -> None:
    diaries = Diary(), Diary()
    found, folders = [], []
    for diary, forced in zip(diaries, ([], [Inside()]), strict=True):
        folder = tmp_path / f"out{len(found)}"
        logger = CSVLogger(folder / "rows")
        made = fit(
            diary,
            *make(),
            *forced,
            settings={**SETTINGS, **settings, "output_dir": str(folder)},
            logger=logger,
        )
        found.append(left(*made))
        folders.append((folder / "rows/lightning_logs/version_0/metrics.csv").read_text())
        if not forced:
            assert taken[0] >= least
            taken[0] = 0
    assert taken[0] == 0
    assert found[0] == found[1]
    assert diaries[0].seen == diaries[1].seen
    assert untimed(folders[0]) == untimed(folders[1])


def untimed(table: str) -> list[list[str]]:
    """Leave the columns of times out of a CSV table."""
    rows = [line.split(",") for line in table.splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if not name.endswith(("runtime", "per_second"))]
    return [[row[i] for i in kept] for row in rows]


def test_the_same_checkpoints(taken: list[int], tmp_path: Path) -> None:
    written = []
    for forced in ([], [Inside()]):
        folder = tmp_path / f"out{len(written)}"
        settings = {**SETTINGS, "output_dir": str(folder), "save_strategy": "steps", "save_steps": 5}
        own = ModelCheckpoint(folder / "own", every_n_train_steps=4, save_top_k=-1)
        fit(own, *forced, settings=settings)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        loops = {name: loops_in(path) for name, path in files.items() if name.endswith(".ckpt")}
        exact = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        contents = {name: contents_of(path) for name, path in files.items() if name.endswith(exact)}
        written.append((sorted(files), loops, contents))
        assert len(loops) == 3
        assert len(contents) == 4 * 3
    assert taken[0] == 12
    assert written[0] == written[1]


def loops_in(path: Path) -> Any:
    """What a Lightning file says of the loops, and of everything else that has a number."""
    found = torch.load(path, weights_only=False)
    return plain(
        {name: found[name] for name in ("loops", "global_step", "epoch", "state_dict", "optimizer_states")}
    )


def contents_of(path: Path) -> Any:
    """What a file of a checkpoint holds."""
    if path.suffix == ".safetensors":
        return path.read_bytes()
    found = torch.load(path, weights_only=False)
    found.pop("hfbridge", None) if isinstance(found, dict) else None
    return plain_arrays(found)


def plain_arrays(value: Any) -> Any:
    """Likewise with NumPy's arrays, of random states."""
    return repr(plain(value))


def test_a_resumed_run_goes_the_short_way(taken: list[int], tmp_path: Path) -> None:
    settings = {**SETTINGS, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 4}
    whole = left(*fit(settings=settings))
    found = []
    for forced in ([], [Inside()]):
        taken[0] = 0
        trainer, module, data = prepare(*forced, settings=settings)
        trainer.fit(module, data, ckpt_path=str(tmp_path / "checkpoint-4"))
        found.append(left(trainer, module))
        assert taken[0] == (0 if forced else 12 - 4)
    assert found[0] == found[1]
    assert found[0]["weights"] == whole["weights"]
    assert found[0]["loops"] == whole["loops"]


def test_a_signal_ends_the_run_after_its_step(taken: list[int]) -> None:
    class Signals(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *hook: Any) -> None:
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer, module, data = prepare(Signals())
    try:
        with pytest.raises(SIGTERMException):
            trainer.fit(module, data)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert taken[0] == trainer.global_step == 2


def test_lightnings_handler_is_known_from_others() -> None:
    found: list[bool] = []

    class Looks(pl.Callback):
        def on_train_start(self, trainer: Any, *hook: Any) -> None:
            found.append(lightning_handles_sigterm(trainer))
            theirs = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            found.append(lightning_handles_sigterm(trainer))
            signal.signal(signal.SIGTERM, theirs)

    trainer, module, data = prepare(Looks())
    trainer.fit(module, data)
    assert found == [True, False]
    assert not lightning_handles_sigterm(trainer)


# Who listens.

ELSEWHERE = ("test", "predict", "sanity", "exception", "checkpoint")  # not in a fit like this one
CALLBACK_HOOKS = sorted(name for name in vars(pl.Callback) if name.startswith(("on_", "setup", "teardown")))
DATA_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")
MODULE_HOOKS = sorted(
    {name for kind in (ModelHooks, CheckpointHooks) for name in vars(kind) if name[0] != "_"}
    - {"configure_sharded_model"}
    | {"training_step", "validation_step", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"}
    | {"backward", "configure_gradient_clipping", "configure_optimizers", "configure_callbacks"}
    | {"on_before_batch_transfer", "on_after_batch_transfer", "setup", "teardown"}
)
IN_STEP = {"on_before_zero_grad", "on_before_optimizer_step", "on_before_backward", "on_after_backward"}
IN_MODULE_STEP = IN_STEP | {
    "training_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "backward",
    "configure_gradient_clipping",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
}


def is_elsewhere(hook: str) -> bool:
    """Whether a hook belongs to another run than this one."""
    return any(word in hook for word in ELSEWHERE)


def listening(base: type, hooks: Any, calls: Counter[str]) -> type:
    """Make a class that counts the calls of some hooks, and otherwise does what its base does."""

    def counting(name: str) -> Any:
        own = getattr(base, name)

        @functools.wraps(own)
        def hook(self: Any, *arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return own(self, *arguments, **named)

        hook.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        del hook.__wrapped__  # type: ignore[attr-defined]
        return hook

    return type(f"Listening{base.__name__}", (base,), {name: counting(name) for name in hooks})


@pytest.fixture(scope="module")
def stock() -> dict[str, Counter[str]]:
    """Count the calls of all hooks at once in Lightning's own loop."""
    calls: dict[str, Counter[str]] = {"callback": Counter(), "module": Counter(), "data": Counter()}
    callback = listening(pl.Callback, CALLBACK_HOOKS, calls["callback"])
    module = listening(hfbridge.HFModule, MODULE_HOOKS, calls["module"])
    fit(callback(), kind=module, settings=SHORT)
    data = listening(hfbridge.HFDataModule, DATA_HOOKS, calls["data"])
    fit(data_kind=data, settings=SHORT)
    return calls


def test_hooks_inside_a_step_are_called(stock: dict[str, Counter[str]]) -> None:
    assert {"on_train_batch_start", "on_train_batch_end"} | IN_STEP <= set(stock["callback"])
    assert set(stock["module"]) >= IN_MODULE_STEP
    assert set(stock["data"]) == set(DATA_HOOKS)
    assert stock["callback"]["on_before_optimizer_step"] == stock["module"]["lr_scheduler_step"] == 3
    assert stock["callback"]["on_before_backward"] == stock["callback"]["on_train_batch_end"] == 2 * 3


@pytest.mark.parametrize("hook", [name for name in CALLBACK_HOOKS if not is_elsewhere(name)])
def test_a_hook_of_a_callback(hook: str, stock: dict[str, Counter[str]], taken: list[int]) -> None:
    calls: Counter[str] = Counter()
    fit(listening(pl.Callback, [hook], calls)(), settings=SHORT)
    assert calls[hook] == stock["callback"][hook]
    assert taken[0] == (0 if hook in IN_STEP else 3)


@pytest.mark.parametrize("hook", [name for name in MODULE_HOOKS if not is_elsewhere(name)])
def test_a_hook_of_the_module(hook: str, stock: dict[str, Counter[str]], taken: list[int]) -> None:
    calls: Counter[str] = Counter()
    fit(kind=listening(hfbridge.HFModule, [hook], calls), settings=SHORT)
    assert calls[hook] == stock["module"][hook]
    assert taken[0] == (0 if hook in IN_MODULE_STEP else 3)


@pytest.mark.parametrize("hook", DATA_HOOKS)
def test_a_hook_of_the_data(hook: str, stock: dict[str, Counter[str]], taken: list[int]) -> None:
    calls: Counter[str] = Counter()
    fit(data_kind=listening(hfbridge.HFDataModule, [hook], calls), settings=SHORT)
    assert calls[hook] == stock["data"][hook]
    assert taken[0] == 0


def test_hooks_of_other_runs(stock: dict[str, Counter[str]], taken: list[int]) -> None:
    calls: Counter[str] = Counter()
    callback = listening(pl.Callback, filter(is_elsewhere, CALLBACK_HOOKS), calls)
    fit(
        callback(),
        kind=listening(hfbridge.HFModule, filter(is_elsewhere, MODULE_HOOKS), calls),
        settings=SHORT,
    )
    assert calls == {
        name: n for name, n in (stock["callback"] + stock["module"]).items() if is_elsewhere(name)
    }
    assert taken[0] == 3


def test_a_hook_set_on_an_object(taken: list[int]) -> None:
    seen = []
    callback = pl.Callback()
    callback.on_before_zero_grad = lambda *hook: seen.append(hook)  # type: ignore[method-assign]
    fit(callback, settings=SHORT)
    assert len(seen) == 3
    assert taken[0] == 0


def test_a_profiler_sees_lightnings_own_loop(taken: list[int]) -> None:
    profiler = SimpleProfiler()
    fit(settings=SHORT, profiler=profiler)
    assert len(profiler.recorded_durations["run_training_batch"]) == 6
    assert taken[0] == 0


def test_a_profiler_of_the_users_that_passes_through_does_not(taken: list[int]) -> None:
    class Notes(PassThroughProfiler):
        seen: ClassVar[list[str]] = []

        def start(self, action_name: str) -> None:
            self.seen.append(action_name)

    fit(settings=SHORT, profiler=Notes())
    assert Notes.seen.count("run_training_batch") == 6
    assert taken[0] == 0


class OwnStrategy(SingleDeviceStrategy):
    """May do anything."""


def test_a_strategy_of_the_users_gets_lightnings_own_loop(taken: list[int]) -> None:
    fit(settings=SHORT, strategy=OwnStrategy("cpu"))
    assert taken[0] == 0


def test_a_plain_trainer_has_lightnings_own_loop() -> None:
    plain_trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    assert type(plain_trainer.fit_loop.epoch_loop) is _TrainingEpochLoop
    assert type(hfbridge.Trainer(SETTINGS, logger=False).fit_loop.epoch_loop) is LeanEpochLoop


def test_the_private_names_are_there() -> None:
    trainer = hfbridge.Trainer(SETTINGS, logger=False)
    loop = trainer.fit_loop.epoch_loop
    for name in ("_results", "_restarting", "_batches_that_stepped"):
        assert hasattr(loop, name), (
            f"_TrainingEpochLoop has no {name} any more, which hfbridge.loops.epoch_loop uses"
        )
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    assert hasattr(trainer._logger_connector, "_first_loop_iter")
    assert hasattr(DDPStrategy(), "_ddp_comm_state")
    fetcher, loader = _PrefetchDataFetcher(), [1, 2]
    fetcher.setup(CombinedLoader(loader, "max_size_cycle"))
    iter(fetcher)
    assert fetcher.combined_loader.iterables is loader
    assert isinstance(fetcher.iterator._iterator, _MaxSizeCycle)  # type: ignore[union-attr]
    assert next(fetcher.iterator._iterator.iterators[0]) == 1  # type: ignore[union-attr]
    assert (fetcher.fetched, fetcher.length, fetcher.done) == (0, 2, False)
