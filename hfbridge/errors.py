"""The errors and warnings of hfbridge, and how several problems become one message.

BridgeError (Exception)
├── SettingsError (ValueError)            a setting or Trainer argument is unknown, wrong or unsupported
├── DataError (ValueError)                dataset, columns, labels, collator or map function
├── ModelError (ValueError)               the model has no loss or cannot be built
│   └── ModuleTypeError (TypeError)       not a LightningModule
├── MetricsError (TypeError)              compute_metrics did not return what it should
├── ReportError (OSError)                 the files of a comparison are missing, damaged or of another form
├── CheckpointError (OSError)             a checkpoint cannot be written, found or read
├── JobError (ValueError)                 a comparison's job, engines or folder do not fit
├── RankError (RuntimeError)              the ranks of a run cannot start, differ, or one has failed
└── MissingDependencyError (ImportError)  a feature needs a package that is not installed
BridgeWarning (UserWarning)               allowed, but probably not meant
"""

import difflib
import textwrap
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn

_LINE_WIDTH = 112
_SUBJECT_WIDTH = 48
# What other libraries call settings.
_ELSEWHERE = {
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_clip_val": "max_grad_norm",
    "log_every_n_steps": "logging_steps",
    "default_root_dir": "output_dir",
    "precision": "bf16",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        subject: what it is about, as the user wrote it: ``optim = "adalomo"``.
        text: what is wrong with the value, what is possible, and what to do next.
    """

    subject: str
    text: str


class BridgeError(Exception):
    """Any error of hfbridge.

    Attributes:
        problems: what the message lists, if it was made from several problems.
    """

    problems: tuple[Problem, ...] = ()


class SettingsError(BridgeError, ValueError):
    """A setting or Trainer argument is unknown, wrong, contradictory or unsupported."""


class DataError(BridgeError, ValueError):
    """The dataset, its columns or labels, the collator or the map function do not fit."""


class ModelError(BridgeError, ValueError):
    """The model returns no loss or cannot be built."""


class ModuleTypeError(ModelError, TypeError):
    """The object to run is not a LightningModule."""


class MetricsError(BridgeError, TypeError):
    """``compute_metrics`` did not return a dictionary of numbers."""


class ReportError(BridgeError, OSError):
    """The files of a comparison are missing, damaged or of another form, so that no report can be made."""


class CheckpointError(BridgeError, OSError):
    """A checkpoint cannot be written, found or read."""


class RankError(BridgeError, RuntimeError):
    """The ranks of a run cannot start, differ, or another one has failed."""


class JobError(BridgeError, ValueError):
    """The job of a comparison cannot be loaded, or its engines or its folder do not fit."""


class MissingDependencyError(BridgeError, ImportError):
    """A feature needs a package that is not installed."""


class BridgeWarning(UserWarning):
    """Something allowed that was probably not meant; the text says how to silence it."""


def describe_problems(problems: Iterable[Problem]) -> str:
    """Lay problems out in two columns, subjects left and wrapped texts right."""
    listed = tuple(problems)
    short = [len(problem.subject) for problem in listed if len(problem.subject) <= _SUBJECT_WIDTH]
    column = 2 + max(short, default=2) + 3
    lines: list[str] = []
    for problem in listed:
        text = textwrap.wrap(
            problem.text, _LINE_WIDTH - column, break_long_words=False, break_on_hyphens=False
        ) or [""]
        if len(problem.subject) <= _SUBJECT_WIDTH:
            first = f"  {problem.subject}".ljust(column) + text.pop(0)
            lines.append(first.rstrip())
        else:
            lines.append(f"  {problem.subject}")
        lines.extend(" " * column + line for line in text)
    return "\n".join(lines)


def raise_problems(error_class: type[BridgeError], headline: str, problems: Iterable[Problem]) -> NoReturn:
    """Raise all problems as one error.

    Raises:
        BridgeError: always, as ``error_class``, with the problems in its ``problems``.
    """
    listed = tuple(problems)
    error = error_class(f"{headline}\n{describe_problems(listed)}")
    error.problems = listed
    raise error


def name_of(function: object) -> str:
    """Return the name of a function of the user's, for messages."""
    return str(getattr(function, "__qualname__", repr(function)))


def suggest(name: object, known: Collection[str]) -> str:
    """Text that names the setting meant: by another library's name, by its first letters, or the nearest."""
    if (meant := _ELSEWHERE.get(str(name))) in known:
        return f"; did you mean {meant}?"
    longer = [other for other in known if other.startswith(str(name)) and len(str(name)) > 2]
    close = longer or difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
