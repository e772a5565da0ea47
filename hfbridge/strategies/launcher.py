"""Processes and process groups: Lightning's launcher and DDP's connection, completed; knows Lightning.

what                                        why
children get RANK                           a TrainingArguments at the top of a script asks for it
a restarted attempt has its own keys        torchrun hands the dead attempt's store to the new one, and its
                                            addresses are still in it
RANK, WORLD_SIZE and LOCAL_RANK are set     so does a TrainingArguments that is made in a running group
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of scripts, whose children know their global rank."""

    def _call_children_scripts(self) -> None:
        """Start this script again for each further rank of this node; `RANK` is the global rank.

        Mirrors: lightning.pytorch.strategies.launchers._SubprocessScriptLauncher._call_children_scripts
        """
        self._check_can_spawn_children()
        environment = self.cluster_environment
        first = environment.node_rank() * self.num_processes
        os.environ.update(
            MASTER_ADDR=environment.main_address,
            MASTER_PORT=str(environment.main_port),
            NODE_RANK=str(environment.node_rank()),
            LOCAL_RANK=str(environment.local_rank()),
            WORLD_SIZE=str(self.num_processes * self.num_nodes),
            RANK=str(first),
        )
        command = _basic_subprocess_cmd()
        self.procs = [
            subprocess.Popen(
                command, env={**os.environ, "LOCAL_RANK": str(local), "RANK": str(first + local)}
            )
            for local in range(1, self.num_processes)
        ]


def launched_ranks() -> tuple[int, int] | None:
    """Ask the environment how many ranks a launcher has started, on all nodes and on this one.

    Returns:
        Both numbers; `None` if Lightning is to start them.
    """
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return None


def open_group(
    environment: ClusterEnvironment, backend: str, *, timeout: timedelta | None, device: torch.device
) -> bool:
    """Open the process group of a restarted attempt; returns False where Lightning's own way is right.

    Args:
        environment: knows rank and size.
        backend: "gloo" or "nccl".
        timeout: what a collective waits for others.
        device: of this rank.
    """
    if dist.is_initialized() or os.environ.get(_RESTARTS, "0") == "0":
        return False
    store, rank, world_size = next(rendezvous("env://"))
    attempt = PrefixStore(f"attempt_{os.environ[_RESTARTS]}", store)
    dist.init_process_group(
        backend,
        store=attempt,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    return True


@contextmanager
def rank_variables(strategy: Any) -> Iterator[None]:
    """Tell those who read the environment which rank this process is."""
    world_size = getattr(strategy, "world_size", 1)
    if world_size == 1:
        yield
        return
    told = {
        "RANK": strategy.global_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": strategy.local_rank,
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
