"""Features of Lightning together, on loaders of the user's, as a LightningModule has them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

import hfbridge
from tests.lightning.plain_data import (
    QUIET,
    PlainModule,
    RowsOneByOne,
    make_loader,
    make_module,
    make_trainer,
)
from tests.tiny import PadRows, make_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),
]
for_all = pytest.mark.parametrize("side", ["reference", "lightning", "hfbridge"])
for_both = pytest.mark.parametrize("side", ["lightning", "hfbridge"])


class Steps(Callback):
    """Notes after which micro-batches of an epoch a step was taken, and whether gradients were left."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int]] = []
        self.clean: list[bool] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.taken):
            self.taken.append((trainer.current_epoch, batch_idx))

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.clean.append(all(p.grad is None or not p.grad.any() for p in module.parameters()))


@for_all
@pytest.mark.parametrize(("rows", "accumulation", "limit"), [(24, 2, 3), (24, 4, 5), (20, 2, 0.6)])
def test_a_limit_that_ends_an_epoch_within_a_step(
    side: str, rows: int, accumulation: int, limit: Any
) -> None:
    steps, settings = Steps(), {"gradient_accumulation_steps": accumulation}
    trainer = make_trainer(side, settings=settings, callbacks=[steps], limit_train_batches=limit)
    module = make_module(side, settings=settings)
    trainer.fit(module, make_loader(rows))
    batches = limit if isinstance(limit, int) else int(rows / 4 * limit)
    ends = [index for index in range(batches) if (index + 1) % accumulation == 0 or index == batches - 1]
    assert steps.taken == [(epoch, index) for epoch in range(2) for index in ends]
    if side != "reference":
        assert module.host.state.global_step == trainer.global_step == len(steps.taken)
    if side == "hfbridge":  # a plain module's optimizer clears them when the next step begins
        assert steps.clean == [True, True]


@for_all
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_is_resumed_from_the_end_of_an_epoch(side: str, epoch: int, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    first = make_trainer(side, epochs=3, callbacks=[keeper])
    module = make_module(side, epochs=3)
    first.fit(module, make_loader(24))
    again = make_trainer(side, epochs=3)
    resumed = make_module(side, epochs=3)
    again.fit(resumed, make_loader(24), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt"))
    assert again.global_step == first.global_step == 18
    assert again.current_epoch == 3


def with_loss_of_its_own(base: Any) -> Any:
    class Mine(base):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.loss_function = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
            self.register_buffer("seen", torch.zeros(()))

    return Mine


@for_both
def test_what_a_subclass_has_beside_the_model_is_loaded(side: str, tmp_path: Path) -> None:
    module = make_module(side, with_loss_of_its_own)
    module.loss_function.weight += 1
    trainer = make_trainer(side)
    trainer.fit(module, make_loader(24))
    module.seen += 5
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "x.ckpt", model=make_model("distilbert"))
    assert loaded.loss_function.weight.tolist() == [2.0, 3.0]
    assert loaded.seen.item() == 5
    other = make_module(side, with_loss_of_its_own)
    trainer.validate(other, make_loader(8), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    assert other.seen.item() == 5


@for_both
def test_what_a_subclass_has_beside_the_model_stays_where_a_directory_has_none(
    side: str, tmp_path: Path
) -> None:
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 6}
    kinds = {"settings": settings}
    trainer = make_trainer(side, **kinds)
    trainer.fit(make_module(side, with_loss_of_its_own, **kinds), make_loader(24))
    module = make_module(side, with_loss_of_its_own, **kinds)
    module.seen += 7
    again = make_trainer(side, **kinds)
    again.fit(module, make_loader(24), ckpt_path=str(tmp_path / "checkpoint-6"))
    assert module.seen.item() == 7
    assert again.global_step == 12


@for_all
def test_a_limit_of_a_loader_without_a_length(side: str) -> None:
    trainer = make_trainer(side, settings={"lr_scheduler_type": "constant"}, limit_train_batches=3)
    module = make_module(side, settings={"lr_scheduler_type": "constant"})
    trainer.fit(module, DataLoader(RowsOneByOne(20), batch_size=4, collate_fn=PadRows()))
    assert trainer.global_step == 6


@for_both
def test_a_monitor_where_no_validation_runs(side: str, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="eval_loss")
    settings = {"eval_strategy": "epoch"}
    trainer = make_trainer(side, settings=settings, callbacks=[keeper], limit_val_batches=0)
    trainer.fit(make_module(side, settings=settings), make_loader(24), make_loader(8))
    assert trainer.global_step == 12


def test_another_module_is_saved_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer("hfbridge", callbacks=[keeper]).fit(PlainModule(), make_loader(24))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]


class Validations(Callback):
    """Notes after which steps validation runs."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("kind", [pl.Trainer, hfbridge.Trainer])
def test_validation_by_batches_over_epochs_without_settings(kind: Any) -> None:
    seen, limits = Validations(), {"val_check_interval": 5, "check_val_every_n_epoch": None}
    quiet = {**QUIET, "enable_checkpointing": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    kind(max_epochs=3, callbacks=[seen], **limits, **quiet).fit(
        PlainModule(), make_loader(28), make_loader(8)
    )
    assert seen.steps == [5, 10, 15, 20]


@pytest.mark.parametrize("kind", [pl.Trainer, hfbridge.Trainer])
def test_an_optimizer_of_its_own_needs_no_length(kind: Any) -> None:
    class Own(hfbridge.HFModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = kind(max_epochs=2, enable_checkpointing=False, accelerator="cpu", **QUIET)
    rows = DataLoader(RowsOneByOne(20), batch_size=4, collate_fn=PadRows())
    trainer.fit(Own(make_model("distilbert")), rows)
    assert trainer.global_step == 10


class OtherEachTime(pl.LightningDataModule):
    """Gives another number of rows each time it is asked."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self._counts = list(counts)

    def train_dataloader(self) -> Any:
        return make_loader(self._counts.pop(0))


@for_all
@pytest.mark.parametrize("counts", [(16, 20, 8), (20, 8, 16)])
@pytest.mark.parametrize("ends", ["epochs", "steps"])
def test_loaders_made_anew_may_have_other_lengths(side: str, counts: tuple[int, ...], ends: str) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2}
    steps_of = [-(-count // 8) for count in counts]
    settings |= {"max_steps": sum(steps_of) - 1} if ends == "steps" else {"num_train_epochs": 3}
    trainer = make_trainer(side, settings=settings, epochs=3, reload_dataloaders_every_n_epochs=1)
    module = make_module(side, settings=settings, epochs=3)
    trainer.fit(module, datamodule=OtherEachTime(*counts))
    expected = settings.get("max_steps", sum(steps_of))
    assert trainer.global_step == expected
    if side != "reference":
        state = module.host.state
        assert (state.global_step, state.max_steps) == (expected, expected)
        assert state.epoch == pytest.approx(
            3 if ends == "epochs" else 2 + (counts[-1] // 8 - 1) / (counts[-1] // 8)
        )
