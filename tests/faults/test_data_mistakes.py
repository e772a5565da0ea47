"""Mistakes in data and functions: what must be, what was got and what to do, before the first step."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import transformers
from transformers import TrainerCallback

import hfbridge
from hfbridge import BridgeWarning, DataError, ModelError, SettingsError
from tests.tiny import PadRows, make_dataset, make_model

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}


class Steps(TrainerCallback):
    """Counts the steps that were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.taken += 1


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def none_taken(steps: Steps) -> Iterator[None]:
    yield
    assert steps.taken == 0


@pytest.fixture
def fit(tmp_path: Any, steps: Steps) -> Callable[..., hfbridge.Trainer]:
    def fit(model: Any, dataset: Any, settings: Any = None, module: Any = None, **data: Any) -> Any:
        given = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "save_strategy": "no",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            **(settings or {}),
        }
        trainer = hfbridge.Trainer(given, callbacks=[steps], logger=False, enable_model_summary=False)
        model = make_model(model) if isinstance(model, str) else model
        trainer.fit(hfbridge.HFModule(model, **(module or {})), hfbridge.HFDataModule(dataset, **data))
        return trainer

    return fit


# Names.


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("max_epochs", "num_train_epochs"),
        ("accumulate_grad_batches", "gradient_accumulation_steps"),
    ],
)
def test_names_of_other_libraries_among_settings(name: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown; did you mean {meant}\\?"):
        hfbridge.Settings(**{name: 3})


class Runs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("distilbert")

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.inner(input_ids, attention_mask, labels=labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(**batch).loss


def test_a_lightning_module_in_place_of_a_model(fit: Any, steps: Steps) -> None:
    with pytest.raises(ModelError, match=r"got the LightningModule `LightningModule`.*\.fit\("):
        hfbridge.HFModule(pl.LightningModule())
    with pytest.raises(ModelError, match="`HFModule`, which is an HFModule: pass it"):
        hfbridge.HFModule(hfbridge.HFModule(make_model("distilbert")))
    with pytest.warns(BridgeWarning, match=r"only `Runs\.forward`, and not its training_step"):
        fit(Runs(), make_dataset("distilbert", 12), data_collator=PadRows())
    assert steps.taken == 2


def test_a_trainer_of_transformers_in_place_of_a_model(tmp_path: Any) -> None:
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ModelError, match=r"got a `transformers\.Trainer`\. Call `hfbridge\.from_trainer"):
        hfbridge.HFModule(transformers.Trainer(make_model("distilbert"), args))


def test_a_test_split_is_not_the_evaluation_set(fit: Any, none_taken: None) -> None:
    splits = make_dataset("distilbert", 12).train_test_split(0.3)
    with pytest.raises(SettingsError, match=r"has the splits train, test;.*eval_dataset=splits\['test'\]"):
        fit("distilbert", splits, EVALUATES)
    with pytest.raises(DataError, match=r"nothing to train on.*has the splits test"):
        fit("distilbert", datasets.DatasetDict(test=splits["test"]))
