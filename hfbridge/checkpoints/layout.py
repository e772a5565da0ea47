"""What a `checkpoint-N` directory is made of, and where its content is in a Lightning checkpoint.

file                         holds                                        key in a .ckpt
model.safetensors, or        the weights; tied ones once                  state_dict, with the prefix "model."
  shards and their index                                                    and tied ones by each name
optimizer.pt                 its state_dict                               optimizer_states[0]
scheduler.pt                 its state_dict                               lr_schedulers[0]
rng_state.pth, or of each    states of Python's, numpy's and torch's      hfbridge.rng, one a rank
  of several ranks             generators
  rng_state_<rank>.pth
  its key "hfbridge"         what the native Trainer forgets; in the      hfbridge.position, one a rank
                               first rank's the manifest, by which
                               damage is found
trainer_state.json           TrainerState                                 hfbridge.trainer_state, as text
the rest                     configuration, tokenizer, training_args.bin  hfbridge.files, as bytes

A model with adapters of PEFT has adapter_model.safetensors in place of the weights, in a folder for each
adapter that is not called "default". In a .ckpt state_dict then holds what is trained and what these files
hold, by names in the model; hfbridge.weights has the names in the files, and what PEFT makes for them.

Under DeepSpeed there is no optimizer.pt. What each rank holds is in files of its own, with weights and
optimizer, in `global_step<N>` (its name is in `latest`); DeepSpeed writes and reads them. They are pickles.

A .ckpt that cannot be resumed has hfbridge.cannot_be_resumed, which says why, in place of the last four.

`training_args.bin` is a pickle, written for the native Trainer and never read here. With `save_only_model`
there are no optimizer.pt, scheduler.pt and rng_state.pth.

A checkpoint is written into a directory beside it, whose name begins with `unfinished-`, and then renamed:
one that has its name is whole.
"""

import re
from pathlib import Path

from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

ADAPTER_SAFE_WEIGHTS_NAME = "adapter_model.safetensors"
UNFINISHED = "unfinished-"
OWN = "hfbridge"
STATE_KEY, RNG_KEY, POSITION_KEY, FILES_KEY, WEIGHTS_KEY, PARTS_KEY, REASON_KEY = (
    f"{OWN}.{name}"
    for name in ("trainer_state", "rng", "position", "files", "weights", "parts", "cannot_be_resumed")
)
PREFIX = "model."

__all__ = [
    "ADAPTER_SAFE_WEIGHTS_NAME",
    "FILES_KEY",
    "OPTIMIZER_NAME",
    "OWN",
    "PARTS_KEY",
    "POSITION_KEY",
    "PREFIX",
    "REASON_KEY",
    "RNG_KEY",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "SCHEDULER_NAME",
    "STATE_KEY",
    "TRAINER_STATE_NAME",
    "TRAINING_ARGS_NAME",
    "UNFINISHED",
    "WEIGHTS_KEY",
    "adapters_in",
    "checkpoint_name",
    "checkpoints_in",
    "has_adapter",
    "has_parts",
    "is_checkpoint",
    "random_files_in",
    "random_name",
    "step_of",
    "unfinished_in",
    "weights_in",
]

_NAMED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_OF_RANK = re.compile(r"rng_state_(\d+)\.pth")


def checkpoint_name(step: int) -> str:
    """Name the directory of an optimizer step."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def random_name(rank: int, ranks: int) -> str:
    """Name the file of a rank's random states."""
    return "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"


def random_files_in(folder: Path) -> list[str]:
    """Name the files of random states that a checkpoint should have, by rank.

    Returns:
        One name for each rank that wrote it, as far as the highest number tells; a numbered file is one of
        two at least. `rng_state.pth` alone, where there is none with a number.
    """
    numbers = [int(named[1]) for path in folder.iterdir() if (named := _OF_RANK.fullmatch(path.name))]
    ranks = max(2, max(numbers) + 1) if numbers else 1
    return [random_name(rank, ranks) for rank in range(ranks)]


def has_parts(folder: Path) -> bool:
    """Whether a checkpoint holds files of DeepSpeed's, with what each rank held.

    Mirrors: transformers.integrations.deepspeed.deepspeed_load_checkpoint
    """
    return any(path.is_dir() for path in folder.glob("global_step*"))


def weights_in(folder: Path) -> Path:
    """Name the file of the weights: an adapter's, if there is one, else the model's."""
    adapter = folder / ADAPTER_SAFE_WEIGHTS_NAME
    return adapter if adapter.exists() else folder / SAFE_WEIGHTS_NAME


def adapters_in(folder: Path) -> list[str]:
    """Name the folders of PEFT's adapters; the one that is called "default" has none."""
    return sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_SAFE_WEIGHTS_NAME}"))


def has_adapter(folder: Path) -> bool:
    """Whether the weights of a checkpoint are those of PEFT's adapters."""
    return weights_in(folder).name == ADAPTER_SAFE_WEIGHTS_NAME or bool(adapters_in(folder))


def step_of(folder: Path) -> int | None:
    """Read the optimizer step in a directory's name; `None` if it has another name."""
    named = _NAMED.fullmatch(folder.name)
    return None if named is None else int(named[1])


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a native checkpoint, whole or not: a directory."""
    return path.is_dir()


def checkpoints_in(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest step first.

    Mirrors: transformers.trainer_utils.get_last_checkpoint
    """
    if not folder.is_dir():
        return []
    found = [
        (step, path) for path in folder.iterdir() if (step := step_of(path)) is not None and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def unfinished_in(folder: Path) -> list[Path]:
    """List what a crash has left of checkpoints that were being written."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob(f"{UNFINISHED}{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
