"""Mistakes in data and functions: what must be, what was got and what to do, before the first step."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase, TrainerCallback

import hfbridge
from hfbridge import BridgeWarning, DataError, MetricsError, ModelError, SettingsError
from tests.tiny import PadRows, make_dataset, make_model, make_rows, make_tokenizer

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}


class Steps(TrainerCallback):
    """Counts the steps that were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.taken += 1


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def none_taken(steps: Steps) -> Iterator[None]:
    yield
    assert steps.taken == 0


@pytest.fixture
def fit(tmp_path: Any, steps: Steps) -> Callable[..., hfbridge.Trainer]:
    def fit(model: Any, dataset: Any, settings: Any = None, module: Any = None, **data: Any) -> Any:
        given = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "save_strategy": "no",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "disable_tqdm": True,
            **(settings or {}),
        }
        trainer = hfbridge.Trainer(given, callbacks=[steps], logger=False, enable_model_summary=False)
        model = make_model(model) if isinstance(model, str) else model
        trainer.fit(hfbridge.HFModule(model, **(module or {})), hfbridge.HFDataModule(dataset, **data))
        return trainer

    return fit


# Names.


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("max_epochs", "num_train_epochs"),
        ("accumulate_grad_batches", "gradient_accumulation_steps"),
    ],
)
def test_names_of_other_libraries_among_settings(name: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown; did you mean {meant}\\?"):
        hfbridge.Settings(**{name: 3})


class Runs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("distilbert")

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.inner(input_ids, attention_mask, labels=labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(**batch).loss


def test_a_lightning_module_in_place_of_a_model(fit: Any, steps: Steps) -> None:
    with pytest.raises(ModelError, match=r"got the LightningModule `LightningModule`.*\.fit\("):
        hfbridge.HFModule(pl.LightningModule())
    with pytest.raises(ModelError, match="`HFModule`, which is an HFModule: pass it"):
        hfbridge.HFModule(hfbridge.HFModule(make_model("distilbert")))
    with pytest.warns(BridgeWarning, match=r"only `Runs\.forward`, and not its training_step"):
        fit(Runs(), make_dataset("distilbert", 12), data_collator=PadRows())
    assert steps.taken == 2


def test_a_trainer_of_transformers_in_place_of_a_model(tmp_path: Any) -> None:
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ModelError, match=r"got a `transformers\.Trainer`\. Call `hfbridge\.from_trainer"):
        hfbridge.HFModule(transformers.Trainer(make_model("distilbert"), args))


def test_a_test_split_is_not_the_evaluation_set(fit: Any, none_taken: None) -> None:
    splits = make_dataset("distilbert", 12).train_test_split(0.3)
    with pytest.raises(SettingsError, match=r"has the splits train, test;.*eval_dataset=splits\['test'\]"):
        fit("distilbert", splits, EVALUATES)
    with pytest.raises(DataError, match=r"nothing to train on.*has the splits test"):
        fit("distilbert", datasets.DatasetDict(test=splits["test"]))


# Columns.


def texts() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"sentence": ["w3 w4", "w5"] * 6, "label": [0, 1] * 6})


def tokenize_text(rows: Any) -> Any:
    return make_tokenizer()(rows["text"])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_map_function_that_reads_a_column_that_is_not_there(
    fit: Any, none_taken: None, batched: bool, is_stream: bool
) -> None:
    rows = texts().to_iterable_dataset() if is_stream else texts()
    with pytest.raises(
        DataError, match=r"map_function \(tokenize_text\) found no 'text'.* sentence, label\."
    ):
        fit("distilbert", rows, map_function=tokenize_text, map_kwargs={"batched": batched})


def with_transform(**columns: Any) -> datasets.Dataset:
    def encode(rows: Any) -> Any:
        return {**make_tokenizer()(rows["text"], padding="max_length", max_length=6), "labels": rows["label"]}

    rows = datasets.Dataset.from_dict({"text": ["w3 w4", "w5"] * 6, "label": [0, 1] * 6, **columns})
    return rows.with_transform(encode)


def collate_text(rows: list[Any]) -> Any:
    return {
        **make_tokenizer()([row["sentence"] for row in rows], padding=True, return_tensors="pt"),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


# The HF Trainer takes columns out of the set, too, and its users set remove_unused_columns=False.
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("columns", [{}, {"input_ids": [[3, 4]] * 12}], ids=["none left", "some left"])
def test_a_transform_that_reads_a_dropped_column(fit: Any, steps: Steps, columns: Any, workers: int) -> None:
    rows, settings = with_transform(**columns), {"dataloader_num_workers": workers}
    with pytest.raises(DataError, match=r"'text'.*was dropped: Dist.*Set remove_unused_columns=False"):
        fit("distilbert", rows, settings)
    assert steps.taken == 0
    fit("distilbert", rows, {**settings, "remove_unused_columns": False})
    assert steps.taken == 2


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list])
def test_a_collator_that_reads_a_dropped_column(fit: Any, none_taken: None, kind: Any) -> None:
    rows = kind([{"input_ids": [3, 4], **row} for row in texts()])
    with pytest.raises(DataError, match=r"'sentence'.*was dropped.*Set remove_unused_columns=False"):
        fit("distilbert", rows, data_collator=collate_text)


# Samples.


@pytest.mark.parametrize("tokenizer", [None, make_tokenizer()], ids=["", "tokenizer"])
@pytest.mark.parametrize("kind", ["set", "list", "stream"])
def test_texts_that_are_not_tokenized(
    fit: Any, none_taken: None, tokenizer: PreTrainedTokenizerBase | None, kind: str
) -> None:
    rows: Any = texts()
    rows = list(rows) if kind == "list" else rows.to_iterable_dataset() if kind == "stream" else rows
    says = r"no column that Dist.*takes but labels: its columns are sentence, label"
    if kind != "set" or tokenizer is not None:
        says += r"|no column 'input_ids'.*columns are (sentence, label|label, sentence)"
    if kind != "set" and tokenizer is None:
        says = r"it has the columns labels, and Dist\w+ computes from 'input_ids'"
    with pytest.raises(DataError, match=says):
        fit("distilbert", rows, module={"processing_class": tokenizer})


def labelled(change: Callable[[Any], Any], kind: str = "distilbert") -> list[Any]:
    name = "labels" if "token" in kind else "label"
    return [{**row, name: change(row[name])} for row in make_rows(kind, 12)]


@pytest.mark.parametrize("kind", ["set", "list", "stream"])
@pytest.mark.parametrize("normalization", ["exact", "native"])
def test_labels_that_are_texts(fit: Any, none_taken: None, kind: str, normalization: str) -> None:
    rows: Any = labelled(lambda label: "pos" if label else "neg")
    if kind != "list":
        rows = datasets.Dataset.from_list(rows)
    rows = rows.to_iterable_dataset() if kind == "stream" else rows
    module = {"processing_class": make_tokenizer(), "loss_normalization": normalization}
    with pytest.raises(DataError, match=r"train set has texts in the column 'label' \(neg, pos\).*class_enc"):
        fit("distilbert", rows, module=module)


def test_labels_that_are_texts_in_an_evaluation_set(fit: Any, none_taken: None) -> None:
    wrong = datasets.Dataset.from_list(labelled(str))
    splits = datasets.DatasetDict(train=make_dataset("distilbert", 12), validation=wrong)
    module = {"processing_class": make_tokenizer(), "compute_metrics": lambda result: {"a": 1.0}}
    with pytest.raises(DataError, match="The eval set has texts in the column 'label'"):
        fit("distilbert", splits, EVALUATES, module=module)


def test_samples_without_a_label(fit: Any, none_taken: None) -> None:
    rows = make_rows("distilbert", 12)
    rows[9]["label"] = None
    with pytest.raises(DataError, match="no value in the column 'label' of sample 9"):
        fit("distilbert", datasets.Dataset.from_list(rows), module={"processing_class": make_tokenizer()})


def test_samples_that_nothing_pads(fit: Any, none_taken: None) -> None:
    says = r"lists of 3 to 12 values in the column 'input_ids', which default_data_collator does not pad\."
    with pytest.raises(DataError, match=says + " Pass processing_class=tokenizer"):
        fit("distilbert", make_dataset("distilbert", 12))
    says = r"'labels', which DataCollatorWithPadding does not pad\. .*DataCollatorForTokenClassification"
    with pytest.raises(DataError, match=says):
        fit(
            "bert-token",
            make_dataset("bert-token", 12),
            module={"processing_class": make_tokenizer()},
        )


# Labels.


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (float, r"floats of the shape \(4,\).*an integer of each sample.*2 floats.*problem_type = None"),
        (lambda label: [label, 1], r"integers of the shape \(4, 2\).*an integer of each sample.*2 floats"),
    ],
    ids=["floats", "flags"],
)
def test_labels_of_another_kind_than_classes(
    fit: Any, none_taken: None, kind: Any, change: Any, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        fit("distilbert", kind(labelled(change)), module={"processing_class": make_tokenizer()})


def test_one_label_fewer_than_tokens(fit: Any, none_taken: None) -> None:
    rows = datasets.Dataset.from_list(labelled(lambda labels: labels[1:], "bert-token"))
    with pytest.raises(DataError, match=r"'labels' has the shape \(4, \d+\), and 'input_ids' \(4, \d+\)"):
        fit("bert-token", rows, data_collator=PadRows())


def test_two_classes_of_a_model_with_one_label(fit: Any, steps: Steps) -> None:
    rows = make_dataset("distilbert", 12)
    with pytest.warns(BridgeWarning, match=r"0 and 1, and Bert.*num_labels=1: it trains a regression"):
        fit("bert-regression", rows, data_collator=PadRows())
    model = make_model("bert-regression")
    model.config.problem_type = "regression"
    with warnings.catch_warnings():
        warnings.simplefilter("error", BridgeWarning)
        fit(model, rows, data_collator=PadRows())
        fit("distilbert", rows, data_collator=PadRows())


# Functions.


def without_items(outputs: Any, labels: Any) -> Any:
    return nn.functional.cross_entropy(outputs.logits, labels)


def with_another_name(outputs: Any, labels: Any, items: Any) -> Any:
    return nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize("function", [without_items, with_another_name, nn.CrossEntropyLoss()])
def test_a_loss_function_without_the_number_of_items(function: Any) -> None:
    with pytest.raises(ModelError, match=r"compute_loss_func must be.*num_items_in_batch \(by that name\); "):
        hfbridge.HFModule(make_model("distilbert"), compute_loss_func=function)


def test_functions_of_evaluations_that_take_too_little_or_too_much() -> None:
    model = make_model("distilbert")
    with pytest.raises(ModelError, match=r"must be a function of logits and labels; .* takes \(logits\)"):
        hfbridge.HFModule(model, preprocess_logits_for_metrics=lambda logits: logits)
    with pytest.raises(ModelError, match=r"must be a function of an EvalPrediction; .* \(logits, labels\)"):
        hfbridge.HFModule(model, compute_metrics=lambda logits, labels: {})
    hfbridge.HFModule(model, compute_metrics=lambda result, compute_result: {})
    hfbridge.HFModule(model, compute_metrics=lambda result, *, compute_result: {})
    hfbridge.HFModule(model, compute_metrics=lambda *given, **named: {})


def of_each_sample(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


@pytest.mark.parametrize("normalization", ["exact", "native"])
def test_a_loss_function_that_returns_a_loss_of_each_sample(
    fit: Any, none_taken: None, normalization: str
) -> None:
    module = {"compute_loss_func": of_each_sample, "loss_normalization": normalization}
    says = r"compute_loss_func \(of_each_sample\) must return one number, got a loss of shape \(4,\)"
    with pytest.raises(ModelError, match=says):
        fit("distilbert", make_dataset("distilbert", 12), module=module, data_collator=PadRows())


# Models.


@pytest.mark.parametrize("normalization", ["exact", "native"])
def test_a_frozen_model(fit: Any, none_taken: None, normalization: str) -> None:
    model = make_model("distilbert").requires_grad_(False)
    total = f"{sum(p.numel() for p in model.parameters()):,}"
    says = rf"all {total} are frozen \(requires_grad=False\)\. Unfreeze some.*peft_config="
    with pytest.raises(ModelError, match=says):
        fit(
            model,
            make_dataset("distilbert", 12),
            module={"loss_normalization": normalization},
            data_collator=PadRows(),
        )


def test_a_loss_that_is_cut_off_from_the_model(fit: Any, none_taken: None) -> None:
    def detached(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return nn.functional.cross_entropy(outputs.logits.detach(), labels)

    with pytest.raises(ModelError, match=r"loss must depend on the parameters of Dist.*Leave out detach\(\)"):
        fit(
            "distilbert",
            make_dataset("distilbert", 12),
            module={"compute_loss_func": detached},
            data_collator=PadRows(),
        )


def test_a_frozen_model_below_a_head_of_the_modules(tmp_path: Any, steps: Steps) -> None:
    class WithHead(hfbridge.HFModule):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.head = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.head(super().training_step(batch, batch_idx).view(1)).sum()

        def configure_optimizers(self) -> Any:
            super().configure_optimizers()
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    settings = {"output_dir": str(tmp_path), "use_cpu": True, "save_strategy": "no", "max_steps": 2}
    trainer = hfbridge.Trainer(settings, callbacks=[steps], logger=False, enable_model_summary=False)
    module = WithHead(make_model("distilbert").requires_grad_(False))
    data = hfbridge.HFDataModule(make_dataset("distilbert", 12), data_collator=PadRows())
    before = module.head.weight.clone()
    trainer.fit(module, data)
    assert not module.head.weight.equal(before)


class Modes(pl.Callback):
    """Keeps what Lightning's summary would show, which is made at the same moment."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluating = [name for name, module in pl_module.named_modules() if not module.training]


@pytest.mark.parametrize("is_named", [True, False], ids=["folder", "object"])
def test_a_model_is_in_training_mode_when_lightning_summarises_it(tmp_path: Any, is_named: bool) -> None:
    model, modes = make_model("distilbert").eval(), Modes()
    model.save_pretrained(tmp_path / "model")
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "save_strategy": "no", "max_steps": 1}
    trainer = hfbridge.Trainer(settings, callbacks=[modes], logger=False, enable_model_summary=False)
    source = (tmp_path / "model", "AutoModelForSequenceClassification") if is_named else (model,)
    data = hfbridge.HFDataModule(make_dataset("distilbert", 8), data_collator=PadRows())
    trainer.fit(hfbridge.HFModule(*source), data)
    assert modes.evaluating == []


@pytest.mark.parametrize("kind", ["folder", "ckpt"])
def test_a_checkpoint_with_added_tokens(tmp_path: Any, fit: Any, kind: str) -> None:
    model = make_model("distilbert")
    model.resize_token_embeddings(55)
    saves = {"save_strategy": "steps", "save_steps": 1}
    trainer = fit(model, make_dataset("distilbert", 12), saves, data_collator=PadRows())
    path = tmp_path / "checkpoint-2"
    if kind == "ckpt":
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
    again = hfbridge.Trainer({"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 3}, logger=False)
    data = hfbridge.HFDataModule(make_dataset("distilbert", 12), data_collator=PadRows())
    with pytest.raises(hfbridge.CheckpointError, match=r"\(55, 16\) for \(50, 16\).*resize_token_embeddings"):
        again.fit(hfbridge.HFModule(make_model("distilbert")), data, ckpt_path=path)


# What is saved and predicted.


def conf(result: Any) -> dict[str, Any]:
    return {"accuracy": 0.5, "confusion": np.eye(2)}


def splits() -> datasets.DatasetDict:
    rows = make_dataset("distilbert", 12)
    return datasets.DatasetDict(train=rows, validation=rows)


def test_metrics_that_json_does_not_hold(fit: Any, steps: Steps) -> None:
    saves: Any = {**EVALUATES, "save_strategy": "steps", "save_steps": 2}
    module: Any = {"compute_metrics": conf}
    with pytest.raises(MetricsError, match=r"what JSON holds.*eval_confusion holds a ndarray.*tolist\(\)"):
        fit("distilbert", splits(), saves, module, data_collator=PadRows())
    assert steps.taken == 0
    is_native = {"loss_normalization": "native"}  # which tries nothing
    with pytest.raises(hfbridge.CheckpointError, match=r"ndarray is not JSON serializable.*tolist\(\)"):
        fit("distilbert", splits(), saves, {**module, **is_native}, data_collator=PadRows())
    steps.taken = 0
    fit("distilbert", splits(), EVALUATES, module, data_collator=PadRows())
    assert steps.taken == 2


class Tied(nn.Module):
    """Shares a weight between its layers, and returns a cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        logits = self.head(self.embedding(input_ids).mean(1))[:, :2]
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "cache": DynamicCache(), "nothing": None}


def test_an_own_module_that_shares_a_weight_is_saved_and_resumed(tmp_path: Any) -> None:
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
    }
    found = []
    for path in (None, tmp_path / "checkpoint-2"):
        model = Tied()
        data = hfbridge.HFDataModule(make_dataset("distilbert", 16), data_collator=PadRows())
        hfbridge.Trainer(settings, logger=False).fit(hfbridge.HFModule(model), data, ckpt_path=path)
        found.append(model.state_dict())
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    again = Tied()
    again.load_state_dict(saved)
    found.append(again.state_dict())
    assert all(w[name].equal(found[0][name]) for w in found[1:] for name in found[0])


@pytest.mark.parametrize("normalization", ["exact", "native"])
def test_outputs_that_are_no_tensors_are_left_out_of_predictions(fit: Any, normalization: str) -> None:
    shapes = []

    def seen(result: Any) -> dict[str, float]:
        shapes.append(result.predictions.shape)
        return {"a": 1.0}

    module = {"compute_metrics": seen, "loss_normalization": normalization}
    with pytest.warns(BridgeWarning, match="outputs of Tied that are tensors, without others such as caches"):
        fit(Tied(), splits(), EVALUATES, module, data_collator=PadRows())
    assert shapes[-1] == (12, 2)
    module["preprocess_logits_for_metrics"] = lambda logits, labels: logits[0]  # of all, as by the HF Trainer
    fit(Tied(), splits(), EVALUATES, module, data_collator=PadRows())
    assert shapes[-1] == (12, 2)
