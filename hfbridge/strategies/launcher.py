"""Processes and process groups: Lightning's launcher and DDP's connection, completed.

what                                        why
children get RANK and LOCAL_WORLD_SIZE      a TrainingArguments at the top of a script reads them
children start as the script was started    Lightning repeats sys.argv as it is when `fit` is called
a rank that ends early is named             Lightning kills the others without a word
children of a failed run are ended          one that hangs would stay for ever
each attempt of torchrun has its own keys   its store outlives a dead attempt, whose addresses are still in it
a group that is open gets ddp_timeout       that of a TrainingArguments does not have it
a group is closed at exit                   gloo aborts the process otherwise
RANK, WORLD_SIZE and LOCAL_RANK are set     so does a TrainingArguments that is made in a running group
"""

import atexit
import errno
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from hfbridge.errors import BridgeWarning, RankError

_logger = logging.getLogger(__name__)

_OF_AGENT = "TORCHELASTIC_USE_AGENT_STORE"
# What ranks may take to start; ddp_timeout, if that is longer.
_MEETING = default_pg_timeout
# Where the script was started: a script may go elsewhere, and its children start like it.
_FIRST_FOLDER = os.getcwd()
# What ranks are given to end by themselves once one has failed; the interpreter takes seconds to go down.
_GRACE_S = 20.0


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of scripts, whose children know their global rank, and end with it.

    Proved by: tests/distributed/test_launchers.py
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._runs = threading.Event()
        self._children = Children([], first_rank=0)

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the further ranks of this node, if they are not started yet, and call the function.

        Raises:
            RankError: the port at which the ranks are to meet is taken.

        Mirrors: lightning.pytorch.strategies.launchers._SubprocessScriptLauncher.launch
        """
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        _set_num_threads_if_needed(num_processes=self.num_processes)  # children inherit the number
        if not environment.creates_processes_externally:
            if environment.node_rank() == 0:
                require_free_port(environment.main_port)
            self._call_children_scripts()
            self._children = Children(self.procs, first_rank=int(os.environ["RANK"]) + 1)
            self._children.watch(is_needed=self._runs.is_set)
        self._runs.set()
        atexit.unregister(self._children.end)
        try:
            return function(*args, **kwargs)
        except BaseException:
            atexit.register(self._children.end)
            close_group_at_exit()  # before: children that wait for this rank learn that it has ended
            raise
        finally:
            self._runs.clear()

    def wait(self) -> int:
        """Wait for the ranks that were started here, which may have more to do than this one.

        Returns:
            0 if all of them have ended well, else 1.
        """
        self._children.end(grace_s=math.inf)
        return int(self._children.have_failed)

    def _call_children_scripts(self) -> None:
        """Start this script again for each further rank of this node; `RANK` is the global rank."""
        self._check_can_spawn_children()
        environment = self.cluster_environment
        first = environment.node_rank() * self.num_processes
        os.environ.update(
            MASTER_ADDR=environment.main_address,
            MASTER_PORT=str(environment.main_port),
            NODE_RANK=str(environment.node_rank()),
            LOCAL_RANK=str(environment.local_rank()),
            WORLD_SIZE=str(self.num_processes * self.num_nodes),
            LOCAL_WORLD_SIZE=str(self.num_processes),
            RANK=str(first),
        )
        self.procs = []
        for local in range(1, self.num_processes):
            command, folder = _command(local)
            variables = {**os.environ, "LOCAL_RANK": str(local), "RANK": str(first + local)}
            self.procs.append(subprocess.Popen(command, env=variables, cwd=folder))


def _command(local_rank: int) -> tuple[Sequence[str], str]:
    """How this script was started, and where; hydra's children have a way of their own."""
    hydra: Any = sys.modules.get("hydra.core.hydra_config")
    if hydra is not None and hydra.HydraConfig.initialized():
        return _hydra_subprocess_cmd(local_rank)
    return [sys.executable, *sys.orig_argv[1:]], _FIRST_FOLDER


class Children:
    """The ranks that this process has started.

    Args:
        processes: by their ranks.
        first_rank: that of the first.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[Any]], *, first_rank: int) -> None:
        self._processes = dict(enumerate(processes, first_rank))
        self._reported: set[int] = set()

    def watch(self, *, is_needed: Callable[[], bool]) -> None:
        """Tell of a child that fails, and end this process if it does not learn of it by itself.

        Args:
            is_needed: whether this process waits for its children.
        """
        threading.Thread(target=self._look, args=(is_needed,), name="hfbridge-watch", daemon=True).start()

    def end(self, *, grace_s: float = _GRACE_S) -> None:
        """Wait for children to end, report those that have failed, and kill those that take too long."""
        deadline = time.monotonic() + grace_s
        for rank, process in self._processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._reported.add(rank)
                _logger.error("hfbridge: rank %d has not ended, and is killed.", rank)
                process.kill()
                process.wait()
        self._tell()

    @property
    def have_failed(self) -> bool:
        """Whether one of them has."""
        return any(process.poll() for process in self._processes.values())

    def _look(self, is_needed: Callable[[], bool]) -> None:
        while not self._tell():
            if all(process.poll() == 0 for process in self._processes.values()):
                return
            time.sleep(0.5)
        time.sleep(_GRACE_S)  # at its next collective the main thread learns of it, and raises
        if is_needed():
            self.end(grace_s=0)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _tell(self) -> bool:
        """Tell of children that have failed, once; returns whether there are any."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        failed = {rank: code for rank, code in codes.items() if code}
        for rank in failed.keys() - self._reported:
            self._reported.add(rank)
            _logger.error("hfbridge: rank %d has ended: %s.", rank, name_end(failed[rank]))
        return bool(failed)


def name_end(code: int) -> str:
    """Say how a process has ended: a number below zero is that of a signal."""
    if code >= 0:
        return f"exit code {code}; its output says why"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def require_free_port(port: int) -> None:
    """Check that this process can bind a port.

    Raises:
        RankError: another process does.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise RankError(_taken(port)) from error
            raise


def _taken(port: int | str) -> str:
    return (
        f"MASTER_PORT={port}, where the ranks are to meet, is in use by another process, perhaps an earlier "
        "run that has not ended. End that one, or set MASTER_PORT to a free port; without it, Lightning's "
        "launcher finds one."
    )


def launched_ranks() -> tuple[int, int] | None:
    """Ask the environment how many ranks a launcher has started, on all nodes and on this one.

    Returns:
        Both numbers; `None` if Lightning is to start them.
    """
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        ranks = int(os.environ["SLURM_NTASKS"])
        return ranks, int(os.environ.get("SLURM_NTASKS_PER_NODE", ranks))
    return None


def open_group(
    environment: ClusterEnvironment, backend: str, *, timeout: timedelta | None, device: torch.device
) -> bool:
    """Open the process group, unless it is open: a TrainingArguments at the top of a script does that, too.

    Then wait until all ranks are here: one whose group was opened at the top may be importing still, and
    `timeout` is meant for ranks that work.

    Args:
        environment: knows rank and size.
        backend: "gloo" or "nccl".
        timeout: what a collective waits for others.
        device: of this rank.

    Returns:
        Whether it was not open.

    Raises:
        RankError: the port at which the ranks are to meet is taken.

    Proved by: tests/distributed/test_launchers.py
    """
    close_group_at_exit()
    is_new = not dist.is_initialized()
    start_limit = max(timeout or _MEETING, _MEETING)
    if is_new:
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        rank, world_size = environment.global_rank(), environment.world_size()
        dist.init_process_group(
            backend,
            store=meet(environment, rank, world_size, timeout=start_limit),
            rank=rank,
            world_size=world_size,
            timeout=start_limit,
            device_id=None if device.type == "cpu" else device,
        )
    else:
        _warn_of_restarts()
        _set_pg_timeout(start_limit)
    dist.barrier(device_ids=None if device.type == "cpu" else [device.index])
    if timeout is not None:
        _set_pg_timeout(timeout)
    return is_new


def meet(environment: ClusterEnvironment, rank: int, world_size: int, *, timeout: timedelta) -> Store:
    """Wait for all ranks: some may still be starting, so this takes longer than a collective may.

    Raises:
        RankError: the port is taken, or some do not come.
    """
    try:
        found: tuple[Store, int, int] = next(rendezvous("env://", rank, world_size, timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise RankError(_taken(environment.main_port)) from error
        raise
    except dist.DistStoreError as error:
        raise RankError(f"Not all ranks have come: {error} Look at the output of the others.") from error
    if os.environ.get(_OF_AGENT) != "True":
        # As torch does: a rank may have its group from a TrainingArguments at the top of the script.
        return PrefixStore("default_pg", found[0])
    return PrefixStore(f"attempt_{agree_on_attempt(found[0], rank, world_size)}", found[0])


def agree_on_attempt(store: Any, rank: int, world_size: int) -> int:
    """Agree with the other ranks on a number that no earlier attempt had, through a store that outlives them.

    torchrun's own count of restarts will not do: it counts what has failed on one node, and differs between
    nodes. The first rank draws the number and answers every rank that requests it by a word of its own, so
    that none takes an answer of an earlier attempt; it is done once all have confirmed this number.

    Args:
        store: of the agent.
        rank: of this process.
        world_size: how many there are.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"hfbridge/requests/{rank}", word)
        number = int(store.get(f"hfbridge/answer/{word}"))  # waits, as long as the store does
        store.set(f"hfbridge/confirmed/{number}/{rank}", "")
        return number
    number = int(store.add("hfbridge/attempts", 1))
    deadline = time.monotonic() + store.timeout.total_seconds()
    waiting = set(range(1, world_size))
    while waiting:
        for other in list(waiting):
            if store.check([f"hfbridge/requests/{other}"]):
                word = store.get(f"hfbridge/requests/{other}").decode()
                store.set(f"hfbridge/answer/{word}", str(number))
            if store.check([f"hfbridge/confirmed/{number}/{other}"]):
                waiting.remove(other)
        if waiting and time.monotonic() > deadline:
            missing, limit_s = ", ".join(map(str, sorted(waiting))), store.timeout.total_seconds()
            raise RankError(
                f"Of {world_size} ranks these have not come in {limit_s:g} s: {missing}. Look at their "
                "output."
            )
        time.sleep(0.02)
    return number


def _warn_of_restarts() -> None:
    """Say what keeps torchrun from restarting a script that opens its process group by itself."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get(_OF_AGENT) == "True" and dist.get_rank() == 0:
        warnings.warn(
            f"torchrun was started with --max-restarts={restarts}, and a restart would fail: the script's "
            "TrainingArguments has opened the process group at torchrun's own store, in which it would find "
            "the ranks that died. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started, with "
            "--standalone or --rdzv-backend=c10d, or give hfbridge.Trainer the settings as a dict or "
            "hfbridge.Settings instead.",
            BridgeWarning,
            stacklevel=2,
        )


def close_group_at_exit() -> None:
    """Close the process group when the process ends, and not before: there may be further runs."""
    atexit.unregister(_close_group)
    atexit.register(_close_group)


def _close_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def rank_variables(strategy: Any) -> Iterator[None]:
    """Tell those who read the environment which rank this process is."""
    world_size = getattr(strategy, "world_size", 1)
    if world_size == 1:
        yield
        return
    variables = {
        "RANK": strategy.global_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": strategy.local_rank,
        "LOCAL_WORLD_SIZE": len(strategy.parallel_devices),
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
