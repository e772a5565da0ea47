"""What settings need of the machine they run on: packages and devices. Asked when a run begins.

    setting                                needs
    optim                                  the package of the optimizer, of settings/optimizer_requirements.py
    report_to                              the package of each reporter; "all" takes those that are there
    tf32=True                              a GPU that has TF32
    optim="galore_adamw_8bit"              a GPU
    use_liger_kernel=True                  a GPU, and the package liger-kernel
    torch_compile_backend                  a backend of the installed torch

Natively, most of these are found missing only after the model is loaded.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Package:
    """An optional package.

    Attributes:
        name: the name to install it by.
        modules: modules of which one must be there.
    """

    name: str
    modules: tuple[str, ...]

    @property
    def is_installed(self) -> bool:
        """Whether one of the modules could be imported; nothing is."""
        return any(map(_is_found, self.modules))


OPTIMIZER_PACKAGES: Mapping[str, Package] = {
    "apollo_torch": Package("apollo-torch", ("apollo_torch",)),
    "bitsandbytes": Package("bitsandbytes", ("bitsandbytes",)),
    "galore_torch": Package("galore-torch", ("galore_torch",)),
    "grokadamw": Package("grokadamw", ("grokadamw",)),
    "optimi": Package("torch-optimi", ("optimi",)),
    "schedulefree": Package("schedulefree", ("schedulefree",)),
    "torchao": Package("torchao", ("torchao",)),
}
"""The package of each module that an optimizer comes from."""

_LIGER = Package("liger-kernel", ("liger_kernel",))
_MLFLOW = Package("mlflow", ("mlflow",))

REPORTER_PACKAGES: Mapping[str, tuple[Package, ...]] = {
    "azure_ml": (Package("azureml-core", ("azureml.core.run",)),),
    "clearml": (Package("clearml", ("clearml",)),),
    "codecarbon": (Package("codecarbon", ("codecarbon",)),),
    "comet_ml": (Package("comet-ml", ("comet_ml",)),),
    "dagshub": (Package("dagshub", ("dagshub",)), _MLFLOW),
    "dvclive": (Package("dvclive", ("dvclive",)),),
    "flyte": (Package("flytekit", ("flytekit",)),),
    "kubeflow": (),
    "mlflow": (_MLFLOW,),
    "neptune": (Package("neptune", ("neptune",)),),
    "swanlab": (Package("swanlab", ("swanlab",)),),
    "tensorboard": (Package("tensorboard", ("tensorboard", "tensorboardX")),),
    "trackio": (Package("trackio", ("trackio",)),),
    "wandb": (Package("wandb", ("wandb",)),),
}
"""The packages that each reporter needs."""

_IS_RECENT = {
    "bitsandbytes": is_bitsandbytes_available,
    "schedulefree": is_schedulefree_available,
    "torchao": is_torchao_available,
}


def require_machine(settings: Settings) -> None:
    """See that the machine has what the settings ask for.

    Raises:
        MissingDependencyError: packages are missing; all are named, with the command that installs them.
        SettingsError: a device or something else of the machine is missing.

    Proved by: tests/unit/settings/test_machine.py
    """
    require_packages(settings)
    problems = list(_lacking(settings))
    if problems:
        raise_problems(SettingsError, "This machine lacks what is asked for; nothing was started.", problems)


def require_packages(settings: Settings) -> None:
    """See that the packages are installed which the settings name, without importing one.

    Raises:
        MissingDependencyError: some are not, or are too old.
    """
    found = list(_missing(settings))
    if found:
        names = " ".join(dict.fromkeys(name for name, _ in found))
        headline = f"Packages are missing; nothing was started. Run: pip install -U {names}"
        raise_problems(MissingDependencyError, headline, [problem for _, problem in found])


def _missing(settings: Settings) -> Iterator[tuple[str, Problem]]:
    """Find packages that are missing, by the name to install them by."""
    module = READERS[settings.optim].package
    if module:
        package, subject = OPTIMIZER_PACKAGES[module], show("optim", settings.optim)
        if not package.is_installed:
            yield package.name, Problem(subject, _not_installed(package))
        elif module in _IS_RECENT and not _IS_RECENT[module]():
            text = f"needs a newer {package.name}; run: pip install -U {package.name}"
            yield package.name, Problem(subject, text)
    if settings.use_liger_kernel and _has_gpu(settings) and not _LIGER.is_installed:
        yield _LIGER.name, Problem("use_liger_kernel = True", _not_installed(_LIGER))
    for reporter in settings.report_to if isinstance(settings.report_to, list) else ():
        for package in REPORTER_PACKAGES.get(reporter, ()):
            if not package.is_installed:
                yield package.name, Problem(show("report_to", reporter), _not_installed(package))


def _not_installed(package: Package) -> str:
    return f"needs the package {package.name}, which is not installed; run: pip install {package.name}"


def _lacking(settings: Settings) -> Iterator[Problem]:
    """Find what else the machine lacks."""
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
