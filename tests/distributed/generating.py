"""What the ranks of a pool run to generate."""

from typing import Any

import torch.distributed as dist
from torch import nn

import hfbridge
from tests.distributed.jobs import run_job_on_both
from tests.distributed.zero import connect
from tests.parity.engines import Job, without_times
from tests.parity.test_evaluation_options import parts_digest
from tests.tiny import VOCABULARY, PadRows, make_model, make_rows

ENDS_AT = 4
"""The token that ends a row at once, if the prompt ends with it."""


def job(kind: str, settings: dict[str, Any] | None = None, **given: Any) -> Job:
    """Make a job whose evaluations generate, and few steps."""
    base = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "predict_with_generate": True}
    settings = {**base, "generation_max_length": 12, **(settings or {})}
    return Job(kind, settings, **{"rows": 30, "compute_metrics": parts_digest, **given})


def generate_on_both(asked: Job) -> dict[str, Any]:
    """Run a job on both engines."""
    if "deepspeed" in asked.settings:
        connect()
    return run_job_on_both(asked)


def ending_llama() -> Any:
    """Build a decoder that repeats its last token; rows that end with `ENDS_AT` end at once."""
    model: Any = make_model("llama", dropout=0.0)
    model.config.tie_word_embeddings = False
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    # A token is most like itself: the head looks for the embedding of the same direction.
    model.lm_head.weight.data = nn.functional.normalize(model.model.embed_tokens.weight.data, dim=-1)
    model.generation_config.eos_token_id = ENDS_AT
    return model


def uneven_prompts(count: int) -> list[dict[str, Any]]:
    """Make prompts of which every second four, those of the first of two ranks, end at once."""
    rows = []
    for index in range(count):
        is_short = index // 4 % 2 == 0
        ids = [7 + index % (VOCABULARY - 7), ENDS_AT if is_short else 5]
        rows.append({"input_ids": ids, "attention_mask": [1, 1], "labels": ids})
    return rows


def generate_by(strategy: str, kind: str) -> dict[str, Any]:
    """Predict, train and evaluate in "exact" by a strategy; returns what was generated and measured."""
    uneven = kind == "uneven"
    rows = uneven_prompts(13) if uneven else make_rows(kind, 13, seed=5)
    model = ending_llama() if uneven else make_model(kind, dropout=0.0)
    settings = job(kind, {"learning_rate": 0.0}).arguments()
    module = hfbridge.HFModule(model, compute_metrics=parts_digest)
    data = hfbridge.HFDataModule(
        train_dataset=rows, eval_dataset=rows, predict_dataset=rows, data_collator=PadRows()
    )

    def new_trainer() -> hfbridge.Trainer:
        return hfbridge.Trainer(settings, strategy=strategy, logger=False, enable_model_summary=False)

    trainer = new_trainer()
    output = trainer.predict_dataset(module, data)
    trainer.fit(module, data)
    row = next(row for row in trainer.log_history if "eval_loss" in row)
    return {
        "predictions": output.predictions,
        "labels": output.label_ids,
        "metrics": without_times(output.metrics),
        "trained": {name: value for name, value in without_times(row).items() if name != "epoch"},
        "rank": dist.get_rank() if dist.is_initialized() else 0,
    }
