"""How measurements of the check run: each in a fresh process with a limit; a failure is a result."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

IMPORTED = ["datasets", "hfbridge.trainer", "hfbridge.module", "hfbridge.datamodule", "transformers"]
LIMIT_S = 150.0


@dataclass(frozen=True)
class Measurement:
    """One function call in a process of its own.

    Attributes:
        name: what its result stands under.
        function: returns a dict that JSON can hold.
        arguments: of the function, by name.
        environment: variables of its process.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def measure(one: Measurement, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Call a measurement's function in a fresh process; a failure is a result: `{"error": ...}`.

    Args:
        one: the measurement.
        limit_s: after which its process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(one, sender))
    began = time.monotonic()
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = (
            receiver.recv() if receiver.poll(limit_s) else {"error": f"no result within {limit_s:.0f} s"}
        )
    except EOFError:
        process.join(10)
        found = {"error": f"the process ended with exit code {process.exitcode}"}
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    return {**found, "took_s": round(time.monotonic() - began, 1)}


def measure_all(
    measurements: Iterable[Measurement],
    *,
    at_once: int,
    end: float,
    keep: Callable[[str, dict[str, Any]], None],
) -> None:
    """Run measurements, some at once; those that cannot begin in time are kept as left out.

    Args:
        measurements: in the order in which they begin.
        at_once: how many, 1 where times are measured.
        end: on the monotonic clock, in seconds.
        keep: called with the name and result of each as it ends.
    """

    def run(one: Measurement) -> None:
        left = end - time.monotonic()
        if left < 10:
            keep(one.name, {"error": "left out: no time was left"})
        else:
            keep(one.name, measure(one, min(LIMIT_S, left)))

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, measurements))


def _call(one: Measurement, sender: Connection) -> None:
    os.environ.update(one.environment)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        found = one.function(**one.arguments)
    except BaseException as error:
        lines: Sequence[str] = traceback.format_exc().splitlines()
        found = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": lines[-12:]}
    sender.send(found)
    sender.close()
