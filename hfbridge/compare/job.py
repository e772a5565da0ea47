"""The job of a comparison: a script whose `build()` returns a transformers.Trainer or a Job."""

import ast
import functools
import hashlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers import Trainer as NativeTrainer

from hfbridge.errors import JobError
from hfbridge.settings import Settings, SettingsSource

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_MODULE = "hfbridge_compared_job"
_EXPECTED = (
    "def build(): it returns a transformers.Trainer (or Seq2SeqTrainer) that has not trained yet, or an "
    "hfbridge.compare.Job"
)


@dataclass(frozen=True)
class Job:
    """What each engine is to train, in place of a transformers.Trainer.

    Everything but collator, metrics and loss may be a function without arguments that returns the value,
    called once in each process.

    Attributes:
        model: the model.
        settings: what `hfbridge.Settings.of` takes.
        train_dataset: training samples.
        eval_dataset: evaluation samples, or a dict of several sets.
        data_collator: `None` leaves the choice to the Trainer.
        processing_class: tokenizer or processor.
        compute_metrics: as in transformers.Trainer.
        compute_loss_func: as in transformers.Trainer.
        preprocess_logits_for_metrics: as in transformers.Trainer.
        callbacks: TrainerCallbacks.
        optimizers: makes optimizer and schedule of the model.
        optimizer_cls_and_kwargs: as in transformers.Trainer.
    """

    model: nn.Module | Callable[[], nn.Module]
    settings: SettingsSource | Callable[[], SettingsSource]
    train_dataset: Any
    eval_dataset: Any = None
    data_collator: Any = None
    processing_class: Any = None
    compute_metrics: Any = None
    compute_loss_func: Any = None
    preprocess_logits_for_metrics: Any = None
    callbacks: Sequence[Any] | Callable[[], Sequence[Any]] = ()
    optimizers: Callable[[nn.Module], tuple[Any, Any]] | None = None
    optimizer_cls_and_kwargs: Any = None

    def make_trainer(self, *, deepspeed: Mapping[str, Any] | None = None) -> NativeTrainer:
        """Make the HF Trainer; of a Seq2SeqTrainingArguments or one of its settings, a Seq2SeqTrainer.

        Args:
            deepspeed: a configuration that is not in the settings.

        Raises:
            SettingsError: a setting is unknown, wrong or not supported.
        """
        args = native_arguments(_made(self.settings), deepspeed=deepspeed)
        model = _made(self.model)
        given: dict[str, Any] = {
            "model": model,
            "args": args,
            "train_dataset": _made(self.train_dataset),
            "eval_dataset": _made(self.eval_dataset),
            "data_collator": self.data_collator,
            "processing_class": _made(self.processing_class),
            "compute_metrics": self.compute_metrics,
            "compute_loss_func": self.compute_loss_func,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
            "callbacks": list(_made(self.callbacks)),
            "optimizers": (None, None) if self.optimizers is None else self.optimizers(model),
        }
        if isinstance(args, Seq2SeqTrainingArguments):
            return Seq2SeqTrainer(**given)
        return NativeTrainer(**given, optimizer_cls_and_kwargs=self.optimizer_cls_and_kwargs)


def native_arguments(source: SettingsSource, *, deepspeed: Mapping[str, Any] | None) -> TrainingArguments:
    """Make a `TrainingArguments`; one to which nothing is added is returned as it is.

    Args:
        source: settings.
        deepspeed: a configuration; `None` leaves that of the settings.
    """
    if isinstance(source, TrainingArguments) and deepspeed is None:
        return source
    settings = Settings.of(source)
    config = deepspeed if deepspeed is not None else settings.deepspeed
    args = settings.as_training_arguments()
    if not config:
        return args
    values = {**settings.given, "deepspeed": config}
    if isinstance(args, Seq2SeqTrainingArguments):
        values["generation_config"] = args.generation_config
    return type(args)(**values)


def _made(value: Any) -> Any:
    return value() if isinstance(value, _FUNCTIONS) else value


def check_script(path: Path) -> None:
    """Check that a file can be a job's script, without running it.

    Raises:
        JobError: it is not there, is no Python, or has no `build`.
    """
    if not path.is_file():
        raise JobError(f"{path}: there is no such file. A job is a Python file with {_EXPECTED}.")
    try:
        tree = ast.parse(path.read_bytes(), filename=path.name)
    except (SyntaxError, ValueError) as error:
        raise JobError(f"{path}: is not Python: {error}. A job is a Python file with {_EXPECTED}.") from error
    if "build" not in _names_in(tree):
        raise JobError(f"{path}: has no build. Add {_EXPECTED}.")


def _names_in(tree: ast.Module) -> set[str]:
    """Names that a module gives itself, wherever."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
            found |= {"build"} if any(alias.name == "*" for alias in node.names) else set()
    return found


@contextmanager
def folder_on_path(path: Path) -> Iterator[None]:
    """Let a script import what lies beside it."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def load_build(path: Path) -> Callable[[], Any]:
    """Run a script, whose name is not `__main__` then, and return its `build`.

    Raises:
        JobError: the script fails, or has no function `build`.
    """
    check_script(path)
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise JobError(f"{path}: cannot be imported; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # what the job holds may be pickled for workers that read data
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise JobError(
            f"{path}: fails when it is loaded: {type(error).__name__}: {error}. What trains belongs into "
            'build(), or below if __name__ == "__main__":.'
        ) from error
    build = getattr(module, "build", None)
    if not callable(build):
        raise JobError(f"{path}: has no function build. Add {_EXPECTED}.")
    return cast(Callable[[], Any], build)


def build_job(path: Path, build: Callable[[], Any]) -> NativeTrainer | Job:
    """Call a script's `build`.

    Raises:
        JobError: it fails, or returns something else.
    """
    try:
        found = build()
    except Exception as error:
        raise JobError(f"{path}: build() fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, (NativeTrainer, Job)):
        raise JobError(f"{path}: build() returns {_kind(found)}. Write {_EXPECTED}.")
    if isinstance(found, NativeTrainer) and found.state.global_step:
        raise JobError(
            f"{path}: build() returns a Trainer that has trained {found.state.global_step} steps. Return "
            "it before train() is called."
        )
    if isinstance(found, NativeTrainer) and found.train_dataset is None:
        raise JobError(f"{path}: build() returns a Trainer without train_dataset. Pass one.")
    return found


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"an object of class {type(value).__name__}"


def sources_of(path: Path) -> dict[str, str]:
    """Digest the script and what it has imported from its folder, by their names in it."""
    folder = path.resolve().parent
    found = {path.resolve()}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py"):
            found.add(Path(file).resolve())
    installed = {"site-packages", "dist-packages"}
    return {
        file.relative_to(folder).as_posix(): digest_of(file)
        for file in sorted(found)
        if file.is_file() and folder in file.parents and not installed & set(file.parts)
    }


def digest_of(file: Path) -> str:
    """Digest a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
