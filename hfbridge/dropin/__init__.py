"""transformers' Trainer and Seq2SeqTrainer, trained on Lightning."""

from hfbridge.dropin.script import dry_run, run
from hfbridge.dropin.trainers import Seq2SeqTrainer, Trainer

__all__ = ["Seq2SeqTrainer", "Trainer", "dry_run", "run"]
