"""Perplexity of texts under a causal language model."""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfbridge.metrics.info import STRING, describe


class Perplexity(evaluate.Metric):
    """Perplexity of each text, and their mean, under a model that is loaded by name or folder."""

    def _info(self) -> evaluate.MetricInfo:
        return describe(
            "Perplexity of texts.",
            {"predictions": STRING},
            arguments="Arguments of compute: model_id, batch_size, add_start_token, device, max_length.",
        )

    def _compute(  # type: ignore[override]
        self,
        predictions: Sequence[str],
        model_id: str,
        batch_size: int = 16,
        add_start_token: bool = True,
        device: str | None = None,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        if device is None or device == "gpu":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer: Any = AutoTokenizer.from_pretrained(model_id)
        if add_start_token and tokenizer.bos_token_id is None:
            raise ValueError(f"The tokenizer of {model_id!r} has no first token; pass add_start_token=False.")
        if max_length is not None and add_start_token:
            max_length -= 1
        encoded = tokenizer(
            list(predictions),
            add_special_tokens=False,
            truncation=max_length is not None,
            max_length=max_length,
        )["input_ids"]
        shortest = 1 if add_start_token else 2
        for text, ids in zip(predictions, encoded, strict=True):
            if len(ids) < shortest:
                raise ValueError(
                    f"The text {text!r} has {len(ids)} tokens; perplexity needs {shortest} or more."
                )
        first = [tokenizer.bos_token_id] if add_start_token else []
        model: Any = AutoModelForCausalLM.from_pretrained(model_id)
        model.to(device).eval()
        found: list[float] = []
        for start in range(0, len(encoded), batch_size):
            found += _of_batch(model, [first + ids for ids in encoded[start : start + batch_size]], device)
        return {"perplexities": found, "mean_perplexity": np.mean(found)}


def _of_batch(model: Any, sequences: list[list[int]], device: str) -> list[float]:
    """Compute the perplexity of each sequence, padded on the right by a token that is masked out."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences], device=device)
    mask = torch.tensor(
        [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences], device=device
    )
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    held = mask[:, 1:]
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    perplexities: list[float] = torch.exp((losses * held).sum(1) / held.sum(1)).tolist()
    return perplexities
