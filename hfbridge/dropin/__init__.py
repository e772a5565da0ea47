"""hfbridge.dropin: transformers' Trainer and Seq2SeqTrainer that train on Lightning; knows both worlds."""

from hfbridge.dropin.script import run
from hfbridge.dropin.trainer import Seq2SeqTrainer, Trainer

__all__ = ["Seq2SeqTrainer", "Trainer", "run"]
