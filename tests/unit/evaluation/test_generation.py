"""Texts of token ids, and what `Seq2SeqTrainer.prediction_step` asks of the Trainer that it is given."""

import ast
import inspect
import textwrap

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import PredictionOutput

from hfbridge import DataError, ModelError, decode
from hfbridge.evaluation.generation import Generation, is_generating, preserve_generation_config
from tests.tiny import make_model, make_tokenizer

IDS = np.array([[3, 4, -100, -100], [5, 0, 6, 7]])
TEXTS = ["w3 w4", "w5 w6 w7"]


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        IDS.tolist(),
        torch.from_numpy(IDS),
        [IDS[:1, :2], IDS[1:]],
        [torch.from_numpy(IDS)],
        PredictionOutput(IDS, None, {}),
        EvalPrediction(IDS, IDS).label_ids,
    ],
    ids=["array", "rows", "tensor", "batches", "batch", "output", "labels"],
)
def test_texts_of_token_ids(given):
    assert decode(given, make_tokenizer()) == TEXTS


def test_special_tokens_may_be_kept():
    kept = decode(IDS, make_tokenizer(), skip_special_tokens=False)
    assert kept == ["w3 w4 [PAD] [PAD]", "w5 [PAD] w6 w7"]


def test_what_was_given_is_left_alone():
    ids = IDS.copy()
    decode(ids, make_tokenizer())
    assert (ids == IDS).all()


def test_logits_are_no_token_ids():
    with pytest.raises(DataError, match=r"got float64 of shape \[2, 4\].*predict_with_generate=True"):
        decode(IDS * 0.5, make_tokenizer())
    with pytest.raises(DataError, match=r"of shape \[4\]"):
        decode(IDS[0], make_tokenizer())


def test_nobody_decodes():
    with pytest.raises(ModelError, match="needs a tokenizer or processor, got None"):
        decode(IDS, None)


def test_padding_without_a_pad_token():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert decode(IDS[1:, 2:], tokenizer) == ["w6 w7"]
    with pytest.raises(ModelError, match="neither pad nor eos token"):
        decode(IDS, tokenizer)


def arguments(**given):
    return Seq2SeqTrainingArguments(use_cpu=True, report_to="none", predict_with_generate=True, **given)


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, {}, {}),
        ({"generation_max_length": 9}, {}, {"max_length": 9}),
        ({"generation_max_length": 9}, {"max_length": 5}, {"max_length": 5}),
        ({"generation_max_length": 9}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"generation_num_beams": 2}, {"num_beams": None}, {"num_beams": 2}),
        ({"generation_num_beams": 2}, {"num_beams": 1, "top_k": 3}, {"num_beams": 1, "top_k": 3}),
    ],
)
def test_a_call_wins_over_the_settings(settings, given, expected):
    made = Generation.of(arguments(**settings), given=given, processing_class=None, weight_by_sample=True)
    assert made.arguments == expected


def test_only_predict_with_generate_generates():
    assert is_generating(arguments())
    assert not is_generating(Seq2SeqTrainingArguments(use_cpu=True))


def test_a_config_is_as_it_was_after_a_rehearsal():
    model = make_model("t5")
    before, config = model.generation_config.to_dict(), model.generation_config
    with preserve_generation_config(model):
        model.generation_config.max_length = 3
    assert model.generation_config is config
    assert config.to_dict() == before


def test_what_the_native_step_asks_of_its_trainer():
    """It is called with a stand-in, which has these names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Seq2SeqTrainer.prediction_step)))
    asked = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert asked == {
        "args",
        "model",
        "label_smoother",
        "compute_loss_context_manager",
        "_gen_kwargs",
        "_pad_tensors_to_max_len",
        "_prepare_inputs",
    }
