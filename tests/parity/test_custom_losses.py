"""Losses, models and metrics of the user's: called as by the HF Trainer, and counted right in "exact"."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    RobertaConfig,
    RobertaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import hfbridge
from tests.parity.engines import BASE, Job, Record, make_ours, run_ours, run_theirs
from tests.tiny import IGNORED, VOCABULARY, PadRows, make_model, make_rows

TWO: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "logging_steps": 1}


class Counted:
    """A loss and a metric that count their calls, as stateful ones of the user's do."""

    def __init__(self) -> None:
        self.numbers: list[float | None] = []
        self.evaluated: list[int] = []

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        self.numbers.append(None if num_items_in_batch is None else float(num_items_in_batch))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def metrics(self, prediction: Any) -> dict[str, float]:
        self.evaluated.append(len(prediction.predictions))
        return {"samples": len(prediction.predictions)}


def counting(run: Callable[..., Record], **options: Any) -> tuple[Counted, Record]:
    counted = Counted()
    job = Job(settings=TWO, compute_loss_func=counted.loss, compute_metrics=counted.metrics)
    return counted, run(job, **options)


def test_native_calls_functions_of_the_users_as_the_hf_trainer_does() -> None:
    theirs, native = counting(run_theirs)
    ours, bridged = counting(run_ours, loss_normalization="native")
    assert None not in theirs.numbers
    assert ours.numbers == theirs.numbers
    assert ours.evaluated == theirs.evaluated == [11]
    assert bridged.log_history == native.log_history


def test_exact_gives_a_loss_function_the_number_it_divides_by() -> None:
    counted, exact = counting(run_ours, loss_normalization="exact")
    assert None not in counted.numbers
    plain = run_ours(Job(settings=TWO, compute_metrics=None), loss_normalization="exact")
    for name in ("loss", "eval_loss"):
        found, expected = ([row[name] for row in rows if name in row] for rows in histories(exact, plain))
        assert found == pytest.approx(expected, rel=1e-6)


def histories(*records: Record) -> list[list[dict[str, Any]]]:
    return [record.log_history for record in records]


def test_a_trial_that_fails_ends_no_run() -> None:
    counted = Counted()

    def second_call_on(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        counted.numbers.append(1.0)
        if len(counted.numbers) == 1:
            raise KeyError("not ready yet")
        return F.cross_entropy(outputs.logits, labels)

    job = Job(settings={"max_steps": 2}, compute_loss_func=second_call_on)
    assert len(run_ours(job, loss_normalization="exact").steps) == 3  # and the state at the end


# Models of the user's.


class NextToken(nn.Module):
    """Predicts each token by the one before; its forward names its labels, and takes no number of items."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        self.calls += 1
        logits = self.head(self.embedding(input_ids))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]), "logits": logits}


class Unnamed(NextToken):
    """The same, whose forward names nothing."""

    def forward(self, **inputs: Any) -> dict[str, Any]:  # type: ignore[override]
        inputs.pop("num_items_in_batch", None)
        return super().forward(**inputs)


def with_all_labels(count: int, seed: int) -> list[dict[str, Any]]:
    return [{**row, "labels": row["input_ids"]} for row in make_rows("llama", count, seed=seed)]


def of_tokens(model: type[nn.Module], metrics: Any = None) -> Job:
    rows = {"train_rows": with_all_labels(16, 3), "validation_rows": with_all_labels(11, 5)}
    settings = {**TWO, "learning_rate": 0.0}
    return Job(kind="llama", model=model, settings=settings, compute_metrics=metrics, **rows)


def true_loss(rows: list[dict[str, Any]]) -> float:
    """The mean over all tokens that are predicted."""
    model = NextToken()
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model(torch.tensor([row["input_ids"]]))["logits"][0, :-1], ids[1:], reduction="none"
            )
            for row in rows
            for ids in [torch.tensor(row["labels"])]
        ]
    return float(torch.cat(losses).double().mean())


@pytest.mark.parametrize("model", [NextToken, Unnamed])
def test_exact_counts_what_a_model_of_the_users_counts(model: type[nn.Module]) -> None:
    counted = Counted()
    exact = run_ours(of_tokens(model, counted.metrics), loss_normalization="exact")
    found = [row["eval_loss"] for row in exact.log_history if "eval_loss" in row]
    assert found == [pytest.approx(true_loss(with_all_labels(11, 5)), rel=1e-6)]
    assert counted.evaluated[-1] == 11


def test_native_calls_a_model_of_the_users_as_often_as_the_hf_trainer() -> None:
    theirs = run_theirs(of_tokens(NextToken))
    ours = run_ours(of_tokens(NextToken))
    assert ours.module.model.calls == theirs.engine.model.calls
    assert ours.log_history == theirs.log_history


def test_native_notes_that_labels_without_a_name_are_not_evaluated() -> None:
    ours = run_ours(of_tokens(Unnamed))
    assert not any("eval_loss" in row for row in run_theirs(of_tokens(Unnamed)).log_history)
    assert not any("eval_loss" in row for row in ours.log_history)
    assert any('label_names=["labels"]' in note for note in ours.module.notes)


# Labels that are all ignored.


class MasksFirst(PadRows):
    """Ignores all labels of the first two micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch, self.batches = super().__call__(rows), self.batches + 1
        if self.batches <= 2:
            batch["labels"].fill_(IGNORED)
        return batch


@pytest.mark.parametrize("normalization", ["exact", "native"])
def test_a_first_step_without_labels_is_warned_of_and_hides_no_note(normalization: str) -> None:
    job = Job(kind="bert-token", rows=16, collator=MasksFirst, settings={"gradient_accumulation_steps": 2})
    with pytest.warns(hfbridge.BridgeWarning, match="All labels of the first optimizer step are ignored"):
        ours = run_ours(replace(job, compute_metrics=None), loss_normalization=normalization)
    assert ours.log_history[0]["loss"] == 0
    assert any("times those of" in note for note in ours.module.notes)


# Samples of a row that see each other.


def roberta() -> nn.Module:
    set_seed(7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaForCausalLM(RobertaConfig(vocab_size=VOCABULARY, is_decoder=True, **sizes))


FLATTENED = {
    "train_rows": [{"input_ids": row["input_ids"]} for row in make_rows("llama", 8)],
    "collator": lambda: DataCollatorWithFlattening(),
    "eval_rows": 0,
    "compute_metrics": None,
    "has_ids": False,
    "is_recorded": False,
}


def test_flattened_samples_that_see_each_other() -> None:
    job = Job(model=roberta, **FLATTENED)  # type: ignore[arg-type]
    trainer, module, data, *_ = make_ours(job, loss_normalization="exact")
    with pytest.raises(hfbridge.ModelError, match="cannot be used with RobertaForCausalLM"):
        trainer.fit(module, data)
    assert any("cannot be used with" in note for note in run_ours(job).module.notes)
    assert run_ours(replace(job, model=None, kind="llama"), loss_normalization="exact").steps


# Evaluations that are weighted, or empty.


def test_the_loss_of_a_seq2seq_job_that_does_not_generate() -> None:
    """`Seq2SeqTrainer` counts the last batch, which is short, as a whole one, whether it generates or not."""
    args = Seq2SeqTrainingArguments(**{**BASE, "eval_strategy": "epoch"})
    rows, held_out = make_rows("t5", 8), make_rows("t5", 11, seed=5)
    theirs = Seq2SeqTrainer(
        model=make_model("t5"),
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=PadRows(),
    )
    theirs.train()
    by_itself = theirs.evaluate()["eval_loss"]
    module = hfbridge.HFModule(make_model("t5"), loss_normalization="native")
    data = hfbridge.HFDataModule(train_dataset=rows, eval_dataset=held_out, data_collator=PadRows())
    trainer = hfbridge.Trainer(args)
    trainer.fit(module, data)
    assert [row["eval_loss"] for row in module.log_history if "eval_loss" in row] == [by_itself]
    assert trainer.validate(module, data)[0]["eval_loss"] == by_itself


@pytest.mark.filterwarnings("ignore:Total length of `EvalLoader`")  # Lightning's
@pytest.mark.parametrize("normalization", ["native", "exact"])
@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_an_empty_evaluation_set(normalization: str, strategy: str) -> None:
    def job(**more: Any) -> Job:
        return Job(
            rows=8,
            settings={"eval_strategy": strategy, **more},
            compute_metrics=None,
            eval_rows=1,
            as_dataset=without_one,
        )

    ours, theirs = run_ours(job(), loss_normalization=normalization), run_theirs(job())
    assert [sorted(row) for row in ours.log_history] == [sorted(row) for row in theirs.log_history]
    assert ours.event_names == theirs.event_names


def without_one(rows: list[dict[str, Any]]) -> Any:
    """Make a dataset; of a single row one that is empty."""
    found = datasets.Dataset.from_list(rows)
    return found.select([]) if len(rows) == 1 else found


# Object detection.


def boxes(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        objects = int(torch.randint(1, 4, (), generator=generator))
        labels = {
            "class_labels": torch.randint(0, 3, (objects,), generator=generator),
            "boxes": torch.rand(objects, 4, generator=generator) * 0.4 + 0.3,
        }
        rows.append({"pixel_values": torch.rand(3, 16, 16, generator=generator), "labels": labels})
    return rows


def yolos() -> nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    set_seed(7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    images = {"image_size": [16, 16], "patch_size": 8, "num_detection_tokens": 5, "num_labels": 3}
    return YolosForObjectDetection(YolosConfig(**sizes, **images))


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


@pytest.mark.parametrize("joins", [True, False])
def test_metrics_of_object_detection_get_every_image_in_exact(joins: bool) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        labels = prediction.label_ids
        seen.append(labels if joins else [label for batch in labels for label in batch])
        return {"images": len(seen[-1])}

    rows = boxes(10, 2)
    job = Job(
        model=yolos,
        train_rows=boxes(4, 1),
        validation_rows=rows,
        collator=lambda: stack,
        has_ids=False,
        is_recorded=False,
        settings={"eval_strategy": "epoch", "eval_do_concat_batches": joins},
        compute_metrics=metrics,
    )
    run_ours(job, loss_normalization="exact")
    assert len(seen[-1]) == 10
    for label, row in zip(seen[-1], rows, strict=True):
        assert np.array_equal(label["class_labels"], row["labels"]["class_labels"])
        assert np.array_equal(label["boxes"], row["labels"]["boxes"])
    native = run_ours(job)
    assert any("Labels are dicts" in note for note in native.module.notes)
    theirs = run_theirs(job)
    assert native.log_history == theirs.log_history
