"""One rank of a pool: runs on all ranks what tests/distributed/pool.py hands out, until there is no more."""

import gc
import os
import pickle
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

LINEAR = torch.nn.functional.linear


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, number = int(os.environ["RANK"]), 0
    before = dict(os.environ)
    while (job := _next_job(folder, number)) is not None:
        module, function, arguments = job
        result: tuple[bool, Any]
        place = folder / f"place-{number}-{rank}"
        place.mkdir()
        os.chdir(place)
        try:
            result = True, getattr(import_module(module), function)(*arguments)
        except BaseException:
            result = False, traceback.format_exc()
        os.chdir(folder)
        _forget(before)
        if number == 0:
            gc.freeze()  # the modules that are imported by now: no later job looks for garbage in them
        _write(folder / f"result-{number}-{rank}", result)
        number += 1
    if dist.is_initialized():
        dist.destroy_process_group()


def _next_job(folder: Path, number: int) -> Any:
    path = folder / f"job-{number}"
    while not path.exists():
        if (folder / "end").exists():
            return None
        time.sleep(0.005)
    return pickle.loads(path.read_bytes())


def _write(path: Path, result: Any) -> None:
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(path)


def _forget(environment: dict[str, str]) -> None:
    """Put the process back into the state in which a job finds it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.nn.functional.linear = (
        LINEAR  # DeepSpeed's stage 3 puts another there, for good, which rounds differently
    )
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
    torch.manual_seed(0)
    np.random.seed(0)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)  # else all of DeepSpeed's buffers, which are large, are filled
    gc.collect()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
