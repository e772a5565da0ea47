"""Make docs/lightning.md: every argument, callback, data form and hook of Lightning, each with its test."""

import argparse
import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch import callbacks  # noqa: E402
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks  # noqa: E402

from hfbridge.types import TrainerArguments  # noqa: E402

TARGET = ROOT / "docs" / "lightning.md"
TESTS = ROOT / "tests"
HEAD = """\
# What works of Lightning

All of it, with Lightning's meaning, under `hfbridge.Trainer` and under a plain `lightning.Trainer`: each line
names the test that shows it under both. An argument of the Trainer or a callback has Lightning's meaning, a
setting transformers'. The one error there is: one thing set twice, to different values. Made by
`python docs/make_lightning.py` from Lightning's own lists and from the tests.
"""
# What is asserted, by the name of the test that asserts it.
DATA = {
    "test_data.py": {
        "test_fit_takes_loaders": "`fit(module, train_loader, val_loader)`, by position and by name",
        "test_an_evaluation_takes_a_loader": "`validate`, `test` and `predict` with a loader",
        "test_loaders_of_the_module": "loaders that the module's own hooks return",
        "test_fit_takes_several_loaders": "lists and dicts of loaders, `CombinedLoader`",
        "test_an_evaluation_takes_loaders_one_after_the_other": "several evaluation loaders",
        "test_a_users_data_module": "any LightningDataModule",
        "test_the_loader_of_an_iterable_dataset": "iterable datasets",
        "test_a_stateful_loader_resumes_in_mid_epoch": "`StatefulDataLoader`, resumed in mid-epoch",
        "test_a_foreign_loader_is_exact_under_our_trainer": (
            "exact normalisation of the loss over loaders of your own, under `hfbridge.Trainer`"
        ),
        "test_a_plain_trainer_takes_the_mean_of_means_and_a_note_says_so": (
            "under a plain Trainer: Lightning's mean over the micro-batches, and a note"
        ),
        "test_test_gives_metrics_of_the_test_set": "`Trainer.test`",
        "test_predictions_come_with_the_indices_of_their_rows": "`predict`: each line once, with its index",
        "test_validate_with_the_best_weights": '`validate(ckpt_path="best")`',
        "test_a_second_fit_of_a_trainer": "a second `fit` of one Trainer",
    },
    "test_any_module.py": {
        "test_our_data_module_gives_plain_batches_to_any_module": "HFDataModule under any LightningModule",
        "test_a_stream_gives_plain_batches_to_any_module": "the same with a stream",
        "test_batch_size_is_that_of_all_loaders": "`HFDataModule(batch_size=)`",
        "test_settings_train_any_module": "`hfbridge.Trainer(settings).fit(any_module)`",
    },
}
STRATEGIES = {
    "distributed/test_lightning_data.py": {
        "test_hfmodule_is_trained_by_lightnings_ddp_as_by_ours": "Lightning's `DDPStrategy` with HFModule",
        "test_a_foreign_module_is_trained_by_our_ddp_as_by_lightnings": (
            "`hfbridge.strategies.DDPStrategy` with any LightningModule"
        ),
    },
    "distributed/test_lightning_strategies.py": {
        "test_it_trains_as_under_ddp": (
            "Lightning's `FSDPStrategy`, `ModelParallelStrategy` (data-parallel) and `DeepSpeedStrategy` "
            "with HFModule: the weights of DDP"
        ),
        "test_it_is_resumed_from_lightnings_own_checkpoint": (
            "the same, resumed from a ModelCheckpoint's file"
        ),
        "test_our_checkpoints_hold_whole_states": (
            "the same, with `save_strategy`: any strategy resumes from `checkpoint-N`; under "
            "Lightning's `DeepSpeedStrategy` it holds no optimizer"
        ),
        "test_ours_train_any_module_as_ddp_does": (
            '`"deepspeed_stage_1"` to `"deepspeed_stage_3"` and `"fsdp2"` of hfbridge with any '
            "LightningModule, on CPUs, too; for `fsdp2` its `configure_model` shards, as Lightning's "
            "ModelParallelStrategy does"
        ),
        "test_it_trains_on_a_gpu": "HFModule under Lightning's strategies, where there is a GPU",
    },
}
OVERRIDES = {
    "test_overrides.py": {
        "test_training_step": "`training_step`, with or without `super()`",
        "test_evaluation_steps": "`validation_step`, `test_step`",
        "test_predict_step": "`predict_step`",
        "test_configure_optimizers": "`configure_optimizers`: optimizer, list, dict with a schedule",
        "test_lr_scheduler_step": "`lr_scheduler_step`",
        "test_optimizer_step": "`optimizer_step`",
        "test_optimizer_zero_grad": "`optimizer_zero_grad`",
        "test_configure_gradient_clipping": "`configure_gradient_clipping`",
        "test_manual_optimization": "manual optimization",
        "test_compute_loss": "`HFModule.compute_loss(outputs, batch)`, a loss of your own",
    },
}


def tests_in(name: str) -> set[str]:
    """Return the names of the test functions of a file."""
    tree = ast.parse((TESTS / _path(name)).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def link(file: str, test: str) -> str:
    """Link to a test.

    Raises:
        SystemExit: there is none of that name.
    """
    if test not in tests_in(file):
        sys.exit(f"docs/make_lightning.py names {file}::{test}, which does not exist")
    return f"[{test}](../tests/{_path(file)})"


def arguments() -> list[str]:
    """List the arguments of `lightning.Trainer`, with their meaning here."""
    text = inspect.getdoc(TrainerArguments) or ""
    meanings = {
        name: " ".join(meaning.split())
        for name, meaning in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    }
    names = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"]
    return [
        f"| `{name}` | {meanings.get(name, 'callbacks of Lightning and of transformers, in one list.')} "
        f"| {link('test_arguments.py', f'test_{name}')} |"
        for name in names
    ]


def table(rows: dict[str, dict[str, str]]) -> list[str]:
    """List what tests assert."""
    return [
        f"| {what} | {link(file, test)} |" for file, tests in rows.items() for test, what in tests.items()
    ]


def render() -> str:
    """Write the page."""
    written = (TESTS / "lightning" / "test_callbacks.py").read_text()
    kinds = [name for name in callbacks.__all__ if re.search(rf'@row\("{name}\b', written)]
    missing = sorted(set(callbacks.__all__) - set(kinds))
    if missing:
        sys.exit(f"tests/lightning/test_callbacks.py has no row for {', '.join(missing)}")
    shown = link("test_callbacks.py", "test_a_callback_has_its_effect")
    hooks = [
        name
        for kind in (ModelHooks, DataHooks, CheckpointHooks)
        for name in vars(kind)
        if not name.startswith("_") and not name.endswith("_dataloader")
    ]
    parts = [
        HEAD,
        "## Arguments of the Trainer\n",
        "| argument | meaning | shown by |\n| --- | --- | --- |",
        *arguments(),
        "\n## Callbacks, the Tuner and loggers\n",
        "| callback | shown by |\n| --- | --- |",
        *(f"| `{name}` | {shown} |" for name in [*kinds, "Tuner"]),
        f"| loggers: CSV, TensorBoard, W&B, MLflow | {_file('test_loggers.py')} |",
        f"| `seed_everything` beside the settings' seed | {_file('test_seeds.py')} |",
        "\n## Data\n",
        "| data | shown by |\n| --- | --- |",
        *table(DATA),
        "\n## Strategies\n",
        "On two ranks. Lightning lets its FSDPStrategy and DeepSpeedStrategy run on GPUs only; the tests "
        "show them on CPUs with that check taken out, and on GPUs where there are some.\n",
        "| strategy | shown by |\n| --- | --- |",
        *table(STRATEGIES),
        "\n## Subclasses of HFModule\n",
        "| override | shown by |\n| --- | --- |",
        *table(OVERRIDES),
        f"| `self.log` with all its options | {_file('test_log.py')} |",
        f"| `save_hyperparameters`, `load_from_checkpoint(path)` | {_file('test_hyperparameters.py')} |",
        "\nHooks, each called in Lightning's order and as often as on any LightningModule "
        f"({link('test_hooks.py', 'test_one_hook_by_itself')}):\n",
        ", ".join(f"`{name}`" for name in hooks) + ".\n",
    ]
    return "\n".join(parts)


def _file(name: str) -> str:
    return f"[{name}](../tests/{_path(name)})"


def _path(file: str) -> str:
    return file if "/" in file else f"lightning/{file}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/lightning.md is not up to date")
    arguments = parser.parse_args()
    if not arguments.check:
        TARGET.write_text(render())
        return 0
    if not TARGET.is_file() or TARGET.read_text() != render():
        print("docs/lightning.md is not what the tests show: run python docs/make_lightning.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
