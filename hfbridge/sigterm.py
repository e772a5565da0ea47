"""SIGTERM on several ranks: Lightning's handler asks all of them to stop; knows Lightning.

Lightning broadcasts twice: from within the handler, where the collective meets whichever of a step the other
ranks are in, and at the beginning of every step, to see whether one has.
"""

import signal
from typing import Any

import lightning.pytorch as pl

from hfbridge.stopping import CommonStop


def listens_to_sigterm(trainer: pl.Trainer) -> bool:
    """Whether Lightning has SIGTERM, and not a callback or the user; it is the same on all ranks."""
    return _notifier(trainer) in _handlers()


def ask_at_sigterm(trainer: pl.Trainer, stop: CommonStop) -> None:
    """Have SIGTERM ask all ranks, in place of the broadcast.

    Mirrors: lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._sigterm_notifier_fn
    Proved by: tests/distributed/test_stopping.py
    """

    def ask(number: int, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not stop.is_asked:
            launcher.kill(number)  # passes it on to the ranks it has started
        stop.is_asked = True

    handlers = _handlers()
    handlers[handlers.index(_notifier(trainer))] = ask


def _notifier(trainer: pl.Trainer) -> Any:
    return trainer._signal_connector._sigterm_notifier_fn


def _handlers() -> list[Any]:
    """The functions that Lightning's handler of SIGTERM calls; none if it is another's."""
    found: list[Any] = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
    return found
