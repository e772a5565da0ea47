"""Training mode is set where it is not, and only looked at where it is."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hfbridge.models.training_mode import set_training


@pytest.fixture
def model() -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=20
    )
    return BertForSequenceClassification(config).train()


def modes(model: nn.Module) -> set[bool]:
    return {module.training for module in model.modules()}


def test_nothing_is_set_where_all_are_in_training_mode(
    model: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "__setattr__", None)
    set_training(model)


@pytest.mark.parametrize("part", ["", "bert.encoder.layer.1", "bert.encoder.layer.1.attention.self.dropout"])
def test_a_part_in_evaluation_mode_is_put_back(model: BertForSequenceClassification, part: str) -> None:
    model.get_submodule(part).eval()
    set_training(model)
    assert modes(model) == {True}


def test_a_module_that_is_missing_is_passed_over(model: BertForSequenceClassification) -> None:
    model.bert.register_module("pooler", None)
    model.classifier.eval()
    set_training(model)
    assert modes(model) == {True}


class Frozen(nn.Linear):
    """A layer that stays in evaluation mode, and counts how often it is told not to."""

    told = 0

    def train(self, mode: bool = True) -> "Frozen":
        self.told += 1
        return super().train(False)


def test_a_train_of_a_class_of_its_own_is_called_each_time(model: BertForSequenceClassification) -> None:
    model.classifier = Frozen(8, 2)
    for _ in range(2):
        set_training(model)
    assert model.classifier.told == 2
    assert not model.classifier.training


def test_a_train_that_was_put_on_the_model_is_called(model: BertForSequenceClassification) -> None:
    told: list[bool] = []
    model.train = lambda mode=True: told.append(mode)  # type: ignore[method-assign]
    set_training(model)
    assert told == [True]


def test_a_compiled_model_is_looked_through(model: BertForSequenceClassification) -> None:
    compiled = torch.compile(model, backend="eager")
    model.bert.eval()
    set_training(compiled)  # type: ignore[arg-type]
    assert modes(model) == {True}
