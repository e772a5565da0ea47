"""A model from an object, a factory, a name or a folder."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, LlamaConfig, LlamaModel

from hfbridge.errors import ModelError
from hfbridge.models.loading import auto_class_of, build_model, check_head, check_source, weights_dtypes
from tests.tiny import make_model

HEAD = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("distilbert").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    make_model("distilbert", dtype=torch.bfloat16).save_pretrained(path)
    return path


def build(source, **arguments):
    return build_model(source, **{"auto_class": HEAD, "dtype": "auto", "model_kwargs": {}, **arguments})


@pytest.mark.parametrize("given", [HEAD, AutoModelForSequenceClassification])
def test_an_auto_class_by_name_or_itself(given):
    assert auto_class_of(given) is AutoModelForSequenceClassification


def test_every_head_of_transformers_is_found_by_name():
    assert auto_class_of("AutoModelForCausalLM") is transformers.AutoModelForCausalLM
    assert auto_class_of("AutoModelForQuestionAnswering") is transformers.AutoModelForQuestionAnswering


def test_a_misspelt_auto_class_is_answered_with_the_nearest():
    with pytest.raises(ModelError, match=f"did you mean .*{HEAD}"):
        auto_class_of("AutoModelForSequenceClasification")


def test_an_unknown_auto_class_is_answered_with_all_there_are():
    with pytest.raises(ModelError, match=r"there are .*AutoModelForCausalLM"):
        auto_class_of("zzz")


@pytest.mark.parametrize("given", [None, 3, BertModel])
def test_no_auto_class_says_which_to_give(given):
    with pytest.raises(ModelError, match="a model given by name or folder needs one, such as"):
        auto_class_of(given)


def test_the_bare_auto_model_has_no_head():
    for given in ("AutoModel", transformers.AutoModel):
        with pytest.raises(ModelError):
            auto_class_of(given)


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_loaded_with_its_weights(as_type, folder):
    model = build(as_type(folder))
    ours, saved = model.state_dict(), make_model("distilbert").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in saved.items())


def test_a_folder_below_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    check_source(f"~/{folder.name}", HEAD)
    assert build(f"~/{folder.name}").config.num_labels == 2


def test_arguments_go_to_from_pretrained(folder):
    assert (
        build(folder, model_kwargs={"num_labels": 2, "id2label": {0: "a", 1: "b"}}).config.id2label[1] == "b"
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), (torch.float32, torch.float32), ("float32", torch.float32)],
)
def test_the_dtype_of_the_weights(dtype, expected, bf16_folder):
    assert weights_dtypes(build(bf16_folder, dtype=dtype)) == {expected}


def test_a_factory_is_called_once():
    calls = []
    assert build(lambda: calls.append(1) or make_model("llama"), auto_class=None).config.model_type == "llama"
    assert calls == [1]


def test_a_factory_may_take_a_trial_as_natively():
    given = []
    build(lambda trial: given.append(trial) or make_model("llama"), auto_class=None)
    build(lambda trial="a default": given.append(trial) or make_model("llama"), auto_class=None)
    build(lambda *, seed=3, **more: given.append(seed) or make_model("llama"), auto_class=None)
    assert given == [None, "a default", 3]


def test_a_factory_that_needs_more_is_refused_early():
    with pytest.raises(ModelError, match=r"needs the arguments config, head; .* functools\.partial"):
        check_source(lambda config, head: make_model("llama"), None)


@pytest.mark.parametrize("made", [None, {}, BertModel])
def test_a_factory_must_return_a_model(made):
    with pytest.raises(ModelError, match=r"factory returned .*; it must return a torch.nn.Module"):
        build(lambda: made)


def test_a_factory_must_not_return_a_base_model():
    with pytest.raises(ModelError, match="BertModel computes hidden states only"):
        build(lambda: BertModel(BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1)))


# Checks that load nothing.


def test_a_base_model_is_refused_with_the_head_to_use():
    config = LlamaConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, vocab_size=5
    )
    with pytest.raises(ModelError, match="LlamaModel computes hidden states only"):
        check_source(LlamaModel(config), None)


def test_a_model_of_the_users_own_is_taken():
    check_head(nn.Linear(1, 1))
    check_source(nn.Linear(1, 1), None)


def test_a_subclass_of_a_base_model_that_has_a_head_is_taken():
    class WithHead(BertModel):
        pass

    check_head(WithHead(BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1)))


def test_an_auto_class_does_not_go_with_a_model_object():
    with pytest.raises(
        ModelError, match=r"auto_class='AutoModelForCausalLM' goes with the name.*Leave auto_class out"
    ):
        check_source(make_model("distilbert"), "AutoModelForCausalLM")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", Path("nowhere"), "~/nowhere", "..\\nowhere"]
)
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ModelError) as caught:
        check_source(name, HEAD)
    for part in ("nowhere", "does not exist", str(Path.cwd()), "config.json"):
        assert part in str(caught.value)


def test_a_hub_name_is_not_looked_up():
    check_source("some-user/some-model", HEAD)
    check_source("bert-base-uncased", HEAD)


@pytest.mark.parametrize("model", [None, 3, {"a": 1}])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ModelError, match="a model, a function that returns one, or the name or folder"):
        check_source(model, None)


def test_a_class_is_not_a_factory_of_models():
    with pytest.raises(ModelError):
        check_source(AutoModelForSequenceClassification, None)
