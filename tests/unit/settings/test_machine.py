"""What a run needs of its machine is asked for before a model is loaded."""

import importlib.util
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import hfbridge
from hfbridge.errors import MissingDependencyError, SettingsError
from hfbridge.settings import Settings, machine, require_machine, require_packages
from tests.tiny import PadRows, make_dataset

BASE: dict[str, Any] = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 1}
LOW_RANK = {"optim_target_modules": "all-linear"}


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make modules impossible to find."""
    find_spec, hidden = importlib.util.find_spec, set()

    def find(name: str, package: str | None = None) -> Any:
        return None if name in hidden else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return lambda *names: hidden.update(names)


@pytest.mark.parametrize(
    ("optim", "module", "package"),
    [
        ("schedule_free_adamw", "schedulefree", "schedulefree"),
        ("stable_adamw", "optimi", "torch-optimi"),
        ("grokadamw", "grokadamw", "grokadamw"),
        ("adamw_torch_4bit", "torchao", "torchao"),
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
        ("rmsprop_bnb", "bitsandbytes", "bitsandbytes"),
        ("galore_adamw", "galore_torch", "galore-torch"),
        ("apollo_adamw", "apollo_torch", "apollo-torch"),
    ],
)
def test_an_optimizer_without_its_package(hide: Any, optim: str, module: str, package: str) -> None:
    more = LOW_RANK if module in ("galore_torch", "apollo_torch") else {}
    hide(module)
    with pytest.raises(MissingDependencyError) as caught:
        require_packages(Settings(optim=optim, **more))
    text = str(caught.value)
    assert text.startswith(f"Packages are missing; nothing was started. Run: pip install -U {package}\n")
    (problem,) = caught.value.problems
    assert problem.subject == f'optim = "{optim}"'
    assert problem.text == f"needs the package {package}, which is not installed; run: pip install {package}"


@pytest.mark.parametrize("reporter", [name for name in INTEGRATION_TO_CALLBACK if name != "kubeflow"])
def test_a_reporter_without_its_package(hide: Any, reporter: str) -> None:
    packages = machine.REPORTER_PACKAGES[reporter]
    hide(*(module for modules in packages.values() for module in modules))
    with pytest.raises(MissingDependencyError) as caught:
        require_packages(Settings(report_to=reporter))
    text = " ".join(str(caught.value).split())
    assert f'report_to = "{reporter}" needs the package {next(iter(packages))}' in text
    assert all(f"pip install {package}" in text for package in packages)


def test_every_reporter_of_transformers_is_known() -> None:
    assert machine.REPORTER_PACKAGES.keys() == INTEGRATION_TO_CALLBACK.keys()


def test_one_of_two_packages_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_is_found", lambda module: module == "tensorboardX")
    require_packages(Settings(report_to="tensorboard"))


def test_all_missing_packages_are_named_with_one_command(hide: Any) -> None:
    hide("optimi", "wandb", "mlflow")
    with pytest.raises(MissingDependencyError) as caught:
        require_packages(Settings(optim="stable_adamw", report_to=["wandb", "mlflow"]))
    assert "Run: pip install -U torch-optimi wandb mlflow\n" in str(caught.value)
    assert len(caught.value.problems) == 3


def test_what_there_is_is_not_imported_and_not_refused(hide: Any) -> None:
    hide("schedulefree", "optimi", "wandb")
    require_packages(Settings())
    require_packages(Settings(report_to="all"))
    require_packages(Settings(report_to="none", optim="adamw_torch"))


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_is_found", lambda module: True)
    monkeypatch.setitem(machine._IS_RECENT, "torchao", lambda: False)
    with pytest.raises(MissingDependencyError, match="needs a newer torchao; run: pip install -U torchao"):
        require_packages(Settings(optim="adamw_torch_8bit"))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"tf32": True}, "needs a GPU with TF32, Ampere or newer; leave it out"),
        ({"report_to": "kubeflow"}, "works inside a Kubeflow TrainJob only"),
        ({"torch_compile_backend": "hpu_backend"}, "is no backend of the installed torch; possible are"),
    ],
    ids=str,
)
def test_what_else_the_machine_lacks(monkeypatch: pytest.MonkeyPatch, values: Any, text: str) -> None:
    monkeypatch.setattr(machine, "is_torch_tf32_available", lambda: False)
    with pytest.raises(SettingsError) as caught:
        require_machine(Settings(**values))
    assert str(caught.value).startswith("Requirements not met; nothing was started.\n")
    assert text in caught.value.problems[0].text


def test_a_gpu_for_an_optimizer_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_is_found", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_machine(Settings(optim="galore_adamw_8bit", **LOW_RANK))
    with pytest.raises(SettingsError, match='runs on a GPU only; use optim="galore_adamw"'):
        require_machine(Settings(optim="galore_adamw_8bit", use_cpu=True, **LOW_RANK))


def test_a_gpu_for_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingsError, match=r"use_liger_kernel = True +has kernels for GPUs only; leave it out"
    ):
        require_machine(Settings(use_liger_kernel=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "_is_found", lambda module: False)
    with pytest.raises(MissingDependencyError, match="pip install -U liger-kernel"):
        require_machine(Settings(use_liger_kernel=True))
    monkeypatch.setattr(machine, "_is_found", lambda module: True)
    require_machine(Settings(use_liger_kernel=True))


def test_a_machine_that_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_torch_tf32_available", lambda: True)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://localhost")
    require_machine(Settings(tf32=True, report_to="kubeflow", torch_compile_backend="aot_eager"))


def test_hfbridges_trainer_asks_when_it_is_made(hide: Any) -> None:
    hide("optimi")
    with pytest.raises(MissingDependencyError, match="torch-optimi"):
        hfbridge.Trainer({**BASE, "optim": "stable_adamw"})


@pytest.mark.parametrize("holder", ["module", "data"])
def test_a_plain_trainers_run_asks_before_the_model_is_loaded(hide: Any, no_model: str, holder: str) -> None:
    hide("optimi")
    settings = {**BASE, "optim": "stable_adamw"}
    module = hfbridge.HFModule(
        no_model,
        "AutoModelForSequenceClassification",
        settings=settings if holder == "module" else None,
    )
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 4),
        data_collator=PadRows(),
        settings=settings if holder == "data" else None,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, enable_model_summary=False, **quiet)
    with pytest.raises(MissingDependencyError, match="torch-optimi"):
        trainer.fit(module, datamodule=data)
