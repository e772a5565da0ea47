"""run: an unmodified script, with hfbridge's classes in place of transformers' Trainer.

    in the script, while it runs                          is
    transformers.Trainer, transformers.trainer.Trainer    hfbridge.dropin.Trainer
    transformers.Seq2SeqTrainer,
      transformers.trainer_seq2seq.Seq2SeqTrainer         hfbridge.dropin.Seq2SeqTrainer
    __name__, sys.argv, sys.path                          as under `python script.py`
    RANK, WORLD_SIZE, LOCAL_RANK, ...                     with several devices, as under torchrun

From-imports, subclasses, and libraries that the script imports get them, too.
"""

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
import transformers.trainer
import transformers.trainer_seq2seq
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning_utilities.core.rank_zero import rank_zero_warn

from hfbridge.dropin.planning import DryRun
from hfbridge.dropin.trainers import Seq2SeqTrainer, Trainer
from hfbridge.errors import BridgeWarning, SettingsError, suggest
from hfbridge.explain import Explanation
from hfbridge.settings.strategy_choice import NAMES, NAMES_IN_SHORT
from hfbridge.strategies import ScriptLauncher, launched_ranks

_NATIVE = transformers.Trainer
_PLACES: tuple[tuple[Any, str, type], ...] = (
    (transformers, "Trainer", Trainer),
    (transformers, "Seq2SeqTrainer", Seq2SeqTrainer),
    (transformers.trainer, "Trainer", Trainer),
    (transformers.trainer_seq2seq, "Trainer", Trainer),
    (transformers.trainer_seq2seq, "Seq2SeqTrainer", Seq2SeqTrainer),
)


def run(
    script: Path, arguments: Sequence[str] = (), *, strategy: str | None = None, devices: int | None = None
) -> int:
    """Run a script as `python script.py` does, with its Trainers trained by Lightning.

    Without a launcher, this starts the further ranks by running this process's command again, which must lead
    to the same call.

    Args:
        script: a Python file that uses `transformers.Trainer` or `Seq2SeqTrainer`.
        arguments: its command line.
        strategy: as of `hfbridge.Trainer`; `None` leaves it to the settings.
        devices: ranks on this machine; `None` is what a launcher has started, or one.

    Returns:
        The script's exit code; 1 if only another rank fails. The script's exceptions are raised.

    Raises:
        SettingsError: script, strategy or number of ranks is wrong.

    Proved by: tests/dropin/test_run.py, tests/distributed/test_dropin.py
    """
    _check(script, strategy, devices)
    with _in_place(strategy):
        if devices is None or devices == 1 or _are_started():
            return _run_as_main(script, arguments)
        environment = LightningEnvironment()
        launcher = ScriptLauncher(environment, devices, 1)
        code: int = launcher.launch(_run_as_main, script, arguments)
    return launcher.wait() or code if code == 0 else code


def dry_run(
    script: Path, arguments: Sequence[str] = (), *, strategy: str | None = None, devices: int | None = None
) -> Explanation:
    """Run a script up to its first `train()`, end it there by a SystemExit, and plan what that would do.

    The plan is made in this process for all ranks; none are started.

    Args:
        script: as of `run`.
        arguments: as of `run`.
        strategy: as of `run`.
        devices: as of `run`.

    Returns:
        What the settings become, what is overridden, what differs, and what is unsupported. The script's
        exceptions are raised.

    Raises:
        SettingsError: the script ends without calling `train`; and as for `run`.

    Proved by: tests/dropin/test_dry_run.py
    """
    _check(script, strategy, devices)
    planner = DryRun(str(script), devices)
    with _in_place(strategy, planner):
        code = _run_as_main(script, arguments)
    if planner.explanation is None:
        raise SettingsError(
            f"{script} ended with exit code {code} and did not call train(), so there is no run to plan. "
            "Pass the arguments with which it trains."
        )
    return planner.explanation


def _check(script: Path, strategy: str | None, devices: int | None) -> None:
    if not Path(script).is_file():
        raise SettingsError(
            f"script={str(script)!r}: there is no such file. Pass the path of a Python script."
        )
    if strategy not in (None, "auto", *NAMES):
        hint = suggest(str(strategy), tuple(NAMES))
        raise SettingsError(f"strategy={strategy!r} is unknown{hint}; there are auto, {NAMES_IN_SHORT}.")
    if devices is None:
        return
    if type(devices) is not int or devices < 1:
        raise SettingsError(f"devices={devices!r}: the number of ranks on this machine is 1 or more.")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _are_started() else devices
    if started != devices:
        raise SettingsError(
            f"devices={devices}, and a launcher has started {started} on this machine. Leave devices out, or "
            "the launcher."
        )


def _are_started() -> bool:
    return launched_ranks() is not None or "LOCAL_RANK" in os.environ


def _run_as_main(script: Path, arguments: Sequence[str]) -> int:
    """Run a script as `__main__`, and return its exit code."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *arguments], [str(Path(script).resolve().parent), *path]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")  # as the interpreter does
        return 1
    finally:
        sys.argv, sys.path = argv, path
    return 0


@contextmanager
def _in_place(strategy: str | None, planner: DryRun | None = None) -> Iterator[None]:
    """Put hfbridge's classes in the place of transformers'."""
    _warn_of_earlier_imports()
    before = [(module, name, vars(module)[name]) for module, name, _ in _PLACES]
    chosen = Trainer.strategy
    Trainer.strategy = chosen if strategy is None else strategy
    Trainer.dry_run = planner
    for module, name, kind in _PLACES:
        setattr(module, name, kind)
    try:
        yield
    finally:
        Trainer.strategy, Trainer.dry_run = chosen, None
        for module, name, kind in before:
            setattr(module, name, kind)


def _warn_of_earlier_imports() -> None:
    """Warn of modules that have imported `transformers.Trainer`, or a subclass of it, already."""
    holders = set()
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if package in ("transformers", "hfbridge", "__main__"):
            continue
        for value in list(getattr(module, "__dict__", {}).values()):
            # type(value), since reading __class__ of a value of torch.distributed warns.
            if not issubclass(type(value), type) or not issubclass(value, _NATIVE):
                continue
            if not issubclass(value, Trainer):
                holders.add(package)
    if holders:
        rank_zero_warn(
            f"hfbridge run: {', '.join(sorted(holders))} had imported transformers.Trainer before; Trainers "
            "made there do not train on Lightning. Import it in the script.",
            category=BridgeWarning,
        )
