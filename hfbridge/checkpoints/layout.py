"""What a `checkpoint-N` directory contains, and where its content is in a Lightning checkpoint.

file                         holds                                        key in a .ckpt
model.safetensors, or        the weights; tied ones once                  state_dict, with the prefix "model."
  shards and their index                                                    and tied ones by each name
optimizer.pt                 its state_dict                               optimizer_states[0]
scheduler.pt                 its state_dict                               lr_schedulers[0]
rng_state.pth, or of each    states of Python's, numpy's and torch's      hfbridge.rng, one a rank
  of several ranks             generators
  rng_state_<rank>.pth
  its key "hfbridge"         what the HF Trainer does not save; for       hfbridge.position, one a rank
                               rank 0 with the manifest
trainer_state.json           TrainerState                                 hfbridge.trainer_state, as text
the rest                     configuration, tokenizer, training_args.bin  hfbridge.files, as bytes

PEFT adapters: adapter_model.safetensors replaces the weights, in a folder per adapter not called "default".
DeepSpeed: `global_step<N>` replaces optimizer.pt and is read and written by DeepSpeed alone (pickles).
A .ckpt that cannot be resumed has hfbridge.cannot_be_resumed, the reason, in place of the last four.
`training_args.bin` is a pickle, written for the HF Trainer and never read. `save_only_model` leaves out
optimizer.pt, scheduler.pt and rng_state.pth. A checkpoint is written under a name that begins with
`unfinished-`, then renamed: one that has its name is complete.
"""

import re
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME as OPTIMIZER_NAME
from transformers.trainer import SCHEDULER_NAME as SCHEDULER_NAME
from transformers.trainer import TRAINER_STATE_NAME as TRAINER_STATE_NAME
from transformers.trainer import TRAINING_ARGS_NAME as TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as SAFE_WEIGHTS_NAME

ADAPTER_SAFE_WEIGHTS_NAME = "adapter_model.safetensors"
UNFINISHED = "unfinished-"
OWN = "hfbridge"
STATE_KEY = f"{OWN}.trainer_state"
RNG_KEY = f"{OWN}.rng"
POSITION_KEY = f"{OWN}.position"
FILES_KEY = f"{OWN}.files"
WEIGHTS_KEY = f"{OWN}.weights"
PARTS_KEY = f"{OWN}.parts"
REASON_KEY = f"{OWN}.cannot_be_resumed"
PREFIX = "model."

_NAMED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_OF_RANK = re.compile(r"rng_state_(\d+)\.pth")


def files_in(folder: Path) -> dict[str, Path]:
    """Return all files below a directory, by relative name."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoint_name(step: int) -> str:
    """Name the directory of an optimizer step."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def random_name(rank: int, ranks: int) -> str:
    """Name the file of a rank's random states."""
    return "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"


def random_files_in(folder: Path) -> list[str]:
    """Name the files of random states that a checkpoint should have, up to the highest rank there."""
    numbers = [int(named[1]) for path in folder.iterdir() if (named := _OF_RANK.fullmatch(path.name))]
    ranks = max(2, max(numbers) + 1) if numbers else 1  # a numbered file is one of two at least
    return [random_name(rank, ranks) for rank in range(ranks)]


def has_parts(folder: Path) -> bool:
    """Whether a checkpoint holds DeepSpeed's files.

    Mirrors: transformers.integrations.deepspeed.deepspeed_load_checkpoint
    """
    return any(path.is_dir() for path in folder.glob("global_step*"))


def weights_in(folder: Path) -> Path:
    """Return the file of the weights: the adapter's, if there is one, else the model's."""
    adapter = folder / ADAPTER_SAFE_WEIGHTS_NAME
    return adapter if adapter.exists() else folder / SAFE_WEIGHTS_NAME


def adapters_in(folder: Path) -> list[str]:
    """Name the folders of PEFT's adapters; "default" has none."""
    return sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_SAFE_WEIGHTS_NAME}"))


def has_adapter(folder: Path) -> bool:
    """Whether the weights of a checkpoint are those of PEFT adapters."""
    return weights_in(folder).name == ADAPTER_SAFE_WEIGHTS_NAME or bool(adapters_in(folder))


def step_of(folder: Path) -> int | None:
    """Read the optimizer step in a directory's name; `None` if it has another name."""
    named = _NAMED.fullmatch(folder.name)
    return None if named is None else int(named[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the newest step first.

    Mirrors: transformers.trainer_utils.get_last_checkpoint
    """
    steps = {path: step_of(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    found = [(step, path) for path, step in steps.items() if step is not None]
    return [path for _, path in sorted(found, reverse=True)]


def unfinished_in(folder: Path) -> list[Path]:
    """List what a crash has left of checkpoints that were being written."""
    return sorted(path for path in folder.glob(f"{UNFINISHED}{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
