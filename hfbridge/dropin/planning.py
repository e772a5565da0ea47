"""DryRun: plans a script's run where the script calls `train`, which then ends the script.

part of the plan             from
settings, differences        hfbridge.explain
overridden methods           Overrides
what is unsupported          both, and all checks before devices or process groups are opened
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from hfbridge.dropin.loader import OwnData
from hfbridge.dropin.replaced_methods import Overrides
from hfbridge.dropin.run_setup import chosen_strategy, ranks_of
from hfbridge.errors import BridgeError, Problem, SettingsError
from hfbridge.explain import Explained, Explanation, Overridden, explain
from hfbridge.migration.convert_trainer import read_values
from hfbridge.migration.trainer_callbacks import sort_callbacks
from hfbridge.settings import Settings


class PlanMade(SystemExit):
    """End a script whose plan is made; `except Exception` does not catch it."""


class DryRun:
    """Plan the first run of a script.

    Args:
        source: the script.
        devices: ranks on this machine; `None` is what a launcher has started, or one.

    Attributes:
        explanation: the plan; `None` until the script has called `train`.

    Proved by: tests/dropin/test_dry_run.py
    """

    def __init__(self, source: str, devices: int | None) -> None:
        self._source, self._devices = source, devices
        self.explanation: Explanation | None = None

    def ranks(self, args: Any) -> dict[str, Any]:
        """Return the arguments of `hfbridge.Trainer` for the planned ranks."""
        return ranks_of(args) if self._devices is None or args.world_size > 1 else {"devices": self._devices}

    def plan(
        self, native: Any, overrides: Overrides, make_run: Callable[[], tuple[Any, Any, Any, Any]]
    ) -> PlanMade:
        """Plan a Trainer's run, and return the exit to raise."""
        problems, steps = list[Problem](), ""
        try:
            overrides.check(type(native).__name__, native.loss_normalization)
            steps = self._set_up(native, *make_run()[:3])
        except BridgeError as error:
            problems += error.problems or [Problem("train()", str(error))]
        part = self._explain(native)
        known = {problem.subject for problem in part.refused} | {*overrides.where.values()}
        part = replace(
            part,
            refused=(*part.refused, *(one for one in problems if one.subject not in known)),
            notes=(*([steps] if steps else []), *part.notes),
        )
        refused = {problem.subject: problem.text for problem in problems}
        listed: list[Overridden] = []
        for name, where in overrides.where.items():
            if where in refused:
                listed.append(Overridden(name, where, "refused", refused[where]))
            else:
                is_method = callable(attrgetter(name)(native))
                listed.append(Overridden(name, where, "called" if is_method else "read"))
        self.explanation = Explanation(self._source, (part,), tuple(listed), "Nothing was trained.")
        return PlanMade(int(bool(self.explanation.refused)))

    def _explain(self, native: Any) -> Explained:
        source: Any = read_values(native, sort_callbacks(native))[0]
        with suppress(SettingsError):  # which explain reports
            source = Settings.of(source, drops_unread=True)
        try:
            ranks = self.ranks(native.args)
        except BridgeError:  # which making the run has raised, too
            ranks = {}
        strategy = chosen_strategy(native.strategy)
        (part,) = explain(
            source,
            strategy=None if strategy == "auto" else strategy,
            loss_normalization=native.loss_normalization,
            **ranks,
        ).parts
        return replace(part, where=f"{self._source}: {type(native).__name__}.train()")

    def _set_up(self, native: Any, trainer: Any, module: Any, data: Any) -> str:
        """Set up the data as `fit` does, with all checks, and describe the run's size."""
        if isinstance(data, OwnData) and trainer.world_size != native.args.world_size:
            return (
                "The training loader is made by the Trainer's methods on each rank; steps were not counted."
            )
        trainer.state.fn, trainer.training = TrainerFn.FITTING, True
        trainer.strategy.connect(module)
        trainer._data_connector.attach_data(module, datamodule=data)
        data.setup("fit")
        schedule, ranks = data.schedule, trainer.world_size
        return (
            f"{schedule.max_steps} optimizer steps in {schedule.epochs} epochs of "
            f"{schedule.micro_batches_per_epoch} micro-batches on {ranks} rank{'s' if ranks > 1 else ''}."
        )
