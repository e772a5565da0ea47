"""`hfbridge fit`, `validate`, `test` and `predict`: LightningCLI with HFModule, HFDataModule and Trainer.

LightningCLI                      here
seed_everything                   an error: `seed` of the settings seeds as in the HF Trainer
objects that a YAML describes     made after that seed, so that a run can be made again
--optimizer, --lr_scheduler       not there: the settings say them
config.yaml                       written to output_dir by fit, and replaced by its next run
predict                           writes what is predicted to output_dir
"""

import os
import re
import sys
from argparse import Action
from collections.abc import Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers import set_seed

from hfbridge.cli.predictions import write_predictions
from hfbridge.datamodule import HFDataModule
from hfbridge.errors import SettingsError
from hfbridge.module import HFModule
from hfbridge.settings import Settings
from hfbridge.trainer import Trainer

_FORM = """\
# What every option of `hfbridge {name}` is if nothing sets it stands below. A run needs little of it:
#
# trainer:                       # arguments of lightning.pytorch.Trainer
#   strategy: auto               # ddp, fsdp2, deepspeed_stage_2, ...
#   devices: 1                   # ranks on each node
#   settings:                    # fields of transformers.TrainingArguments
#     output_dir: out
#     num_train_epochs: 3
#     learning_rate: 5.0e-5
#     eval_strategy: epoch
# model:
#   model: distilbert-base-uncased
#   auto_class: AutoModelForSequenceClassification
#   processing_class: distilbert-base-uncased
#   model_kwargs: {{num_labels: 2}}
# data:
#   dataset:
#     class_path: datasets.load_dataset
#     init_args: {{path: csv, data_files: {{train: train.csv, validation: validation.csv}}}}
#   map_function: parts.tokenize # the function tokenize of parts.py, in the folder where the command runs

"""
"""Printed before the options of `--print_config`: which of them matter."""

# What only makes sense in Python, or says again what stands under trainer.
_NOT_ASKED = {"model": {"optimizers", "settings"}, "data": {"settings"}}


def run(arguments: Sequence[str]) -> int:
    """Do one of Lightning's commands.

    Args:
        arguments: the name of the command, and its options.

    Raises:
        SystemExit: the command line is wrong, or help was requested.
        BridgeError: something in the config cannot be done.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does: what a YAML names is found from here
    if any(argument.partition("=")[0] == "--print_config" for argument in arguments):
        sys.stdout.write(_FORM.format(name=arguments[0]))
    set_parsing_settings(instantiate_subclass_spec_in_any=True, validate_subclass_spec_in_any=True)
    BridgeCLI(arguments)
    return 0


class BridgeCLI(LightningCLI):
    """LightningCLI of hfbridge.

    Args:
        arguments: the name of a command, and its options.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(
            HFModule,
            HFDataModule,
            trainer_class=Trainer,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # ckpt_path= loads into the module of the config
            parser_class=_Parser,
            parser_kwargs={
                "prog": "hfbridge",
                **{name: {"usage": f"hfbridge {name} [options]"} for name in self.subcommands()},
            },
            args=list(arguments),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List the commands, each with the arguments that are left out."""
        inner = {"model", "dataloaders", "datamodule", "weights_only"}
        return {
            "fit": {"model", "datamodule"},
            "validate": inner,
            "test": inner,
            "predict": {*inner, "return_predictions"},
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Have the option that every config of LightningCLI has; `seed` of the settings says it."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=False,
            help="only false: seed of trainer.settings seeds as the HF Trainer does",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the command line, and check settings before anything is made.

        Raises:
            SettingsError: they are wrong, or `seed_everything` is set.
        """
        self.config = parser.parse_args(args)
        said = self.config[self.config.subcommand]
        if (seed := said["seed_everything"]) is not False:
            raise SettingsError(
                f"seed_everything: {seed} seeds otherwise than the HF Trainer. Leave it out, and set "
                f"seed: {42 if seed is True else seed} below trainer: settings."
            )

    def before_instantiate_classes(self) -> None:
        """Seed, as scripts of the HF Trainer do before they build anything."""
        set_seed(Settings.of(self._get(self.config, "trainer")["settings"]).seed)

    def predict(self, model: HFModule, datamodule: HFDataModule, **other: Any) -> None:
        """Predict, and write what comes of it."""
        assert isinstance(self.trainer, Trainer)
        write_predictions(self.trainer, model, datamodule, **other)


class _Parser(LightningArgumentParser):
    """Lightning's parser without what has no place on a command line."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, formatter_class=_HelpFormatter, **named)

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **named: Any) -> Any:
        skip = {*named.pop("skip", ()), *_NOT_ASKED.get(nested_key or "", ())}
        return super().add_class_arguments(theclass, nested_key, skip=skip, **named)


class _HelpFormatter(DefaultHelpFormatter):
    """Help without the lists of all classes that could be named: torchmetrics alone has two hundred."""

    def _get_help_string(self, action: Action) -> str:
        return re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action))


class _SaveConfig(SaveConfigCallback):
    """Write the config of a training run once all is checked; that of an evaluation would replace it."""

    def setup(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def on_fit_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")
