"""What the parts of the check train: models from configurations, ragged samples from a seed, settings.

Each function takes `tiny`: small enough for a dry run on a CPU, or of a size that keeps a GPU busy.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 7


@dataclass(frozen=True)
class Task:
    """What is trained, and how large.

    Attributes:
        name: "classifier" (of MiniLM's size, 22 million parameters) or "language model" (half a billion).
        micro_batch: samples of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        lengths: the fewest and the most tokens of a sample.
        bf16: whether autocast is on.
    """

    name: str
    micro_batch: int
    accumulation: int
    lengths: tuple[int, int]
    bf16: bool = False


def make_task(name: str, *, tiny: bool) -> Task:
    if name == "classifier":
        return Task(name, 4, 2, (4, 16)) if tiny else Task(name, 32, 4, (16, 256))
    if name == "ragged language model":
        return Task(name, 2, 1, (8, 32), bf16=True) if tiny else Task(name, 8, 1, (128, 2048), bf16=True)
    return Task(name, 2, 1, (32, 32), bf16=True) if tiny else Task(name, 8, 1, (2048, 2048), bf16=True)


def make_model(task: str, *, tiny: bool, dropout: float = 0.1) -> Any:
    """Build a model with random weights, the same each time."""
    import transformers

    transformers.set_seed(SEED)
    if task == "classifier":
        config = transformers.BertConfig(
            vocab_size=vocabulary(tiny=tiny),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **_size(384, 6, 12, 1536, tiny=tiny),
        )
        return transformers.BertForSequenceClassification(config)
    llama = transformers.LlamaConfig(
        vocab_size=vocabulary(tiny=tiny),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
        **_size(1280, 20, 20, 3456, tiny=tiny),
    )
    return transformers.LlamaForCausalLM(llama)


def _size(hidden: int, layers: int, heads: int, intermediate: int, *, tiny: bool) -> dict[str, int]:
    if tiny:
        hidden, layers, heads, intermediate = 16, 2, 2, 32
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }


def vocabulary(*, tiny: bool) -> int:
    return 64 if tiny else 32_000


def make_rows(task: Task, count: int, *, tiny: bool) -> Any:
    """Draw samples: `input_ids`, and `labels`, a class or the tokens themselves."""
    import datasets

    draw = random.Random(SEED)
    words = range(3, vocabulary(tiny=tiny))
    ids = [draw.choices(words, k=draw.randint(*task.lengths)) for _ in range(count)]
    labels: list[Any] = [draw.randint(0, 1) for _ in ids] if task.name == "classifier" else ids
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


class Collator:
    """Pad `input_ids`, and labels that are tokens, to the longest sample: `[batch, seq]`."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        }
        if isinstance(rows[0]["labels"], list):
            labels = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        else:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def make_settings(folder: Path | str, *, tiny: bool, **more: Any) -> dict[str, Any]:
    """Say what all trainings share; `more` are further fields of TrainingArguments."""
    return {
        "output_dir": str(folder),
        "use_cpu": tiny,
        "seed": SEED,
        "learning_rate": 1e-4,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }


def make_callback(**events: Callable[[Any], None]) -> Any:
    """Make a TrainerCallback; each event is a function of the state."""
    import transformers

    def wrap(event: Callable[[Any], None]) -> Any:
        return lambda self, args, state, control, **kwargs: event(state)

    return type("Events", (transformers.TrainerCallback,), {name: wrap(e) for name, e in events.items()})()


def wait_for_device() -> None:
    """Wait until the GPU has done what it was given, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit_native(model: Any, settings: dict[str, Any], rows: Any, callbacks: Any = ()) -> Any:
    """Train with `transformers.Trainer`; returns it."""
    import transformers
    from transformers.trainer_callback import PrinterCallback

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=Collator(),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def fit_hfbridge(
    model: Any,
    settings: dict[str, Any],
    rows: Any,
    callbacks: Any = (),
    *,
    trainer: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
) -> Any:
    """Train with hfbridge; returns the HFModule.

    Args:
        model: a `PreTrainedModel`.
        settings: fields of TrainingArguments.
        rows: the train set.
        callbacks: Lightning's or transformers'.
        trainer: further arguments of `hfbridge.Trainer`.
        module: of `HFModule`.
        data: of `HFDataModule`.
        ckpt_path: of `fit`.
    """
    import hfbridge

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {name: value for name, value in settings.items() if name != "disable_tqdm"}
    ours = hfbridge.HFModule(model, **{"loss_normalization": "native", **(module or {})})
    given = hfbridge.HFDataModule(train_dataset=rows, **{"data_collator": Collator(), **(data or {})})
    fitted = hfbridge.Trainer(settings, callbacks=list(callbacks), **quiet, **(trainer or {}))
    fitted.fit(ours, given, ckpt_path=ckpt_path)
    return ours


def find_difference(
    expected: list[dict[str, float]], found: list[dict[str, float]], names: tuple[str, ...]
) -> dict[str, Any] | None:
    """Name the first logged number that differs; `None` where all are equal to the bit."""
    for step, (one, other) in enumerate(zip(expected, found, strict=True), 1):
        for name in names:
            if one[name] != other[name]:
                relative = abs(one[name] - other[name]) / max(abs(one[name]), 1e-30)
                return {
                    "step": step, "quantity": name, "expected": one[name], "found": other[name],
                    "relative": relative,
                }  # fmt: skip
    return None


def largest_difference(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """Give the largest difference of weights, absolute; 0.0 where they are equal to the bit."""
    if expected.keys() != found.keys():
        raise ValueError(f"other weights: {sorted(expected.keys() ^ found.keys())}")
    return max(
        float((expected[name].double().cpu() - found[name].double().cpu()).abs().max()) for name in expected
    )
