"""One job by every strategy, with the same samples in each optimizer step: how far trajectories lie apart.

In `loss_normalization="exact"` neither the number of ranks nor the cut into micro-batches changes what is
computed, but the order in which sums are taken, and so the last bits.
"""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, set_seed

import hfbridge
from tests.parity.engines import BASE
from tests.tiny import VOCABULARY, PadRows, make_model, make_rows

STRATEGIES = (
    "ddp",
    "fsdp",
    "fsdp2",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
)
# The task, and the kind of model in tests/tiny.py; with an adapter, only it is trained.
TASKS = {
    "sequence classification": ("distilbert", False),
    "causal language model": ("llama", False),
    "causal language model, tied weights": ("gpt2", False),
    "sequence to sequence, tied weights": ("t5", False),
    "causal language model, LoRA": ("llama", True),
}
ROWS, MICRO_BATCH, GLOBAL_BATCH, STEPS = 48, 2, 16, 20


@dataclass(frozen=True)
class Trajectory:
    """What a run went through.

    Attributes:
        losses: of each step.
        grad_norms: likewise.
        weights: at the end, of the first rank; empty on others.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


class Gather(pl.Callback):
    """Gather the weights while the ranks still share them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        found = module.sharing.weights(module.model)
        if found is not None and trainer.is_global_zero:
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def build(task: str) -> nn.Module:
    """Make the model of a task; no dropout, whose masks differ between ranks."""
    kind, has_adapter = TASKS[task]
    model = smooth_t5() if kind == "t5" else make_model(kind, dropout=0.0)
    if not has_adapter:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapted: nn.Module = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    )
    return adapted


def smooth_t5() -> nn.Module:
    """Build a T5 as of version 1.1.

    Version 1 has ReLU, at whose corner a difference in the last bit of an activation is one of a whole weight
    in the gradient: there, the gradient norm of one step was seen to differ by 3e-5, its loss by 1e-7.
    """
    set_seed(7)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )


def run(task: str, strategy: str, ranks: int) -> Trajectory:
    """Train a task's model on this rank."""
    return train(hfbridge.HFModule(build(task)), TASKS[task][0], strategy, ranks)


def train(module: hfbridge.HFModule, kind: str, strategy: str, ranks: int) -> Trajectory:
    """Train on this rank, with the rows of a kind of model."""
    gather = Gather()
    settings = {
        **BASE,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": GLOBAL_BATCH // MICRO_BATCH // ranks,
        "max_grad_norm": 0.5,
    }
    trainer = hfbridge.Trainer(
        settings, strategy=strategy, callbacks=[gather], logger=False, enable_model_summary=False
    )
    rows = make_rows(kind, ROWS)
    data = hfbridge.HFDataModule(train_dataset=rows, data_collator=PadRows())
    trainer.fit(module, data)
    steps = [row for row in trainer.log_history if "loss" in row]
    return Trajectory([r["loss"] for r in steps], [r["grad_norm"] for r in steps], gather.weights)


def deviation(one: Trajectory, other: Trajectory) -> dict[str, float]:
    """Return the largest relative differences of losses and gradient norms, and that of all weights."""
    assert len(one.losses) == len(other.losses) == STEPS
    assert one.weights.keys() == other.weights.keys()

    def largest(these: list[float], those: list[float]) -> float:
        return max(abs(a - b) / abs(a) for a, b in zip(these, those, strict=True))

    apart = sum(float((one.weights[n].double() - other.weights[n].double()).norm() ** 2) for n in one.weights)
    whole = sum(float(tensor.double().norm() ** 2) for tensor in one.weights.values())
    return {
        "loss": largest(one.losses, other.losses),
        "grad_norm": largest(one.grad_norms, other.grad_norms),
        "weights": (apart / whole) ** 0.5,
    }
