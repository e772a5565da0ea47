"""What settings need of the machine: packages and devices, checked when a run begins.

setting                                needs
optim                                  the optimizer's package
report_to                              the package of each reporter; "all" takes the installed ones
tf32=True                              a GPU that has TF32
optim="galore_adamw_8bit"              a GPU
use_liger_kernel=True                  a GPU, and the package liger-kernel
torch_compile_backend                  a backend of the installed torch
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping

import torch
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_schedulefree_available,
    is_torch_tf32_available,
    is_torchao_available,
)

from hfbridge.errors import MissingDependencyError, Problem, SettingsError, raise_problems
from hfbridge.settings.optimizer_requirements import READERS
from hfbridge.settings.rules import show
from hfbridge.settings.settings import Settings

OPTIMIZER_PACKAGES: Mapping[str, str] = {
    "apollo_torch": "apollo-torch",
    "bitsandbytes": "bitsandbytes",
    "galore_torch": "galore-torch",
    "grokadamw": "grokadamw",
    "optimi": "torch-optimi",
    "schedulefree": "schedulefree",
    "torchao": "torchao",
}
"""The package to install for each module that an optimizer comes from."""

REPORTER_PACKAGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **{name: {name: (name,)} for name in ("clearml", "codecarbon", "dvclive", "mlflow", "neptune")},
    **{name: {name: (name,)} for name in ("swanlab", "trackio", "wandb")},
    "azure_ml": {"azureml-core": ("azureml.core.run",)},
    "comet_ml": {"comet-ml": ("comet_ml",)},
    "dagshub": {"dagshub": ("dagshub",), "mlflow": ("mlflow",)},
    "flyte": {"flytekit": ("flytekit",)},
    "kubeflow": {},
    "tensorboard": {"tensorboard": ("tensorboard", "tensorboardX")},
}
"""The packages that each reporter needs, and the modules of each, of which one must be installed."""

_IS_RECENT = {
    "bitsandbytes": is_bitsandbytes_available,
    "schedulefree": is_schedulefree_available,
    "torchao": is_torchao_available,
}


def require_machine(settings: Settings) -> None:
    """Check that the machine has the packages and devices that the settings need.

    Raises:
        MissingDependencyError: packages are missing; all are named, with the command that installs them.
        SettingsError: a device or something else of the machine is missing.

    Proved by: tests/unit/settings/test_machine.py
    """
    require_packages(settings)
    if problems := list(_find_lacking(settings)):
        raise_problems(SettingsError, "Requirements not met; nothing was started.", problems)


def require_packages(settings: Settings) -> None:
    """Check that the packages that the settings need are installed, without importing one.

    Raises:
        MissingDependencyError: some are not, or are too old.
    """
    if missing := list(_find_missing(settings)):
        names = " ".join(dict.fromkeys(name for name, _ in missing))
        headline = f"Packages are missing; nothing was started. Run: pip install -U {names}"
        raise_problems(MissingDependencyError, headline, [problem for _, problem in missing])


def _find_missing(settings: Settings) -> Iterator[tuple[str, Problem]]:
    """Find packages that are missing, by the name to install them by."""
    needed: list[tuple[str, str, tuple[str, ...]]] = []
    module = READERS[settings.optim].package
    if module:
        needed.append((show("optim", settings.optim), OPTIMIZER_PACKAGES[module], (module,)))
    if settings.use_liger_kernel and _has_gpu(settings):
        needed.append(("use_liger_kernel = True", "liger-kernel", ("liger_kernel",)))
    for reporter in settings.report_to if isinstance(settings.report_to, list) else ():
        packages = REPORTER_PACKAGES.get(reporter, {}).items()
        needed += [(show("report_to", reporter), package, modules) for package, modules in packages]
    for subject, package, modules in needed:
        if not any(map(_is_found, modules)):
            text = f"needs the package {package}, which is not installed; run: pip install {package}"
            yield package, Problem(subject, text)
        elif package in _IS_RECENT and not _IS_RECENT[package]():
            yield package, Problem(subject, f"needs a newer {package}; run: pip install -U {package}")


def _find_lacking(settings: Settings) -> Iterator[Problem]:
    if settings.tf32 and not is_torch_tf32_available():
        yield Problem("tf32 = True", "needs a GPU with TF32, Ampere or newer; leave it out")
    if READERS[settings.optim].needs_gpu and not _has_gpu(settings):
        yield Problem(show("optim", settings.optim), 'runs on a GPU only; use optim="galore_adamw"')
    if settings.use_liger_kernel and not _has_gpu(settings):
        yield Problem("use_liger_kernel = True", "has kernels for GPUs only; leave it out")
    if "kubeflow" in settings.report_to and not os.environ.get("KUBEFLOW_TRAINER_SERVER_URL"):
        text = "works inside a Kubeflow TrainJob only, which sets KUBEFLOW_TRAINER_SERVER_URL; leave it out"
        yield Problem(show("report_to", "kubeflow"), text)
    backend = settings.torch_compile_backend
    if backend is not None and backend not in (found := torch.compiler.list_backends(exclude_tags=())):
        possible = ", ".join(sorted(found))
        text = f"is no backend of the installed torch; possible are {possible}"
        yield Problem(show("torch_compile_backend", backend), text)


def _has_gpu(settings: Settings) -> bool:
    return torch.cuda.is_available() and not settings.use_cpu


def _is_found(module: str) -> bool:
    """Whether a module could be imported; finding a submodule imports its parents, if there are any."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
