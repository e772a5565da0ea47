"""The loss in chunks is the model's own: its value and all gradients, in float64, whatever is masked.

transformers' losses cast logits to float32, which in float64 would leave 1e-7; here that cast is left out,
so that only the order of sums differs.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hfbridge.losses import chunked
from hfbridge.losses.chunked import ChunkedLoss, rows_at_a_time
from hfbridge.losses.criterion import Criterion
from hfbridge.losses.item_counts import read_traits
from tests.properties.test_split_law import gradient_of
from tests.tiny import IGNORED

WORDS, ROWS, TOKENS = 96, 3, 8
_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_MODERN = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, tuple[Any, hf.PreTrainedConfig]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_GROUPED)),
    "llama, tied": (hf.LlamaForCausalLM, hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "gpt2, tied": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=64),
    ),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_GROUPED)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**_GROUPED)),
    "gemma2, not capped": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**_GROUPED, head_dim=8, final_logit_softcapping=None, attn_implementation="eager"),
    ),
    "phi, with a bias": (hf.PhiForCausalLM, hf.PhiConfig(**_SIZES)),
    "mixtral, with its router's loss": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(
            **_GROUPED, num_local_experts=2, output_router_logits=True, experts_implementation="eager"
        ),
    ),
    "modernbert, masked": (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**_SIZES, **_MODERN)),
}
# Sums are taken in another order; weights, and with them logits, are below 1.
EQUAL = {"rtol": 1e-10, "atol": 1e-14}


@functools.cache
def model_of(kind: str) -> nn.Module:
    """Make a model in float64 without dropout, whose head has more to say than a new one."""
    hf.set_seed(3)
    cls, config = CONFIGS[kind]
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model: nn.Module = cls(config).double()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.3)
    return model


def arguments(**more: Any) -> Any:
    """Of the settings, those that are looked at."""
    return SimpleNamespace(**{"label_smoothing_factor": 0.0, "use_liger_kernel": False, **more})


def batch_of(counted: list[bool], *, seed: int = 5) -> dict[str, Tensor]:
    """Draw ids; the labels that are not counted are masked, [ROWS, TOKENS]."""
    ids = torch.randint(3, WORDS, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.tensor(counted).view(ROWS, TOKENS), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def in_chunks(model: nn.Module) -> Iterator[Criterion]:
    """Compute losses in chunks of some rows of the 24."""
    found = ChunkedLoss(model, arguments())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_VALUES", 7 * WORDS)
        yield Criterion(chunked=found)
    found.undo()


@contextmanager
def without_casts() -> Iterator[None]:
    """Leave float64 as it is where `float` is called."""
    own = Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Tensor, "float", lambda self, *a, **k: self if self.dtype is torch.float64 else own(self, *a, **k)
        )
        yield


def loss_and_gradients(
    criterion: Criterion, model: nn.Module, inputs: dict[str, Tensor], number: Tensor | None
) -> dict[str, Tensor]:
    """Run forward and backward."""
    model.train()
    model.zero_grad()
    loss, _ = criterion(model, inputs, number, traits=read_traits(model))
    loss.backward()
    none = torch.zeros(())
    return {"loss": loss.detach()} | {
        name: none if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("kind", list(CONFIGS))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_it_is_the_models_own_loss(kind: str, data: st.DataObject) -> None:
    counted = data.draw(st.lists(st.booleans(), min_size=ROWS * TOKENS, max_size=ROWS * TOKENS))
    counted[data.draw(st.integers(0, ROWS - 1)) * TOKENS + data.draw(st.integers(1, TOKENS - 1))] = True
    held = data.draw(st.none() | st.integers(1, 99), label="num_items_in_batch")
    number = None if held is None else torch.tensor(float(held))
    model, inputs = model_of(kind), batch_of(counted)
    with without_casts():
        theirs = loss_and_gradients(Criterion(), model, inputs, number)
        with in_chunks(model) as criterion:
            ours = loss_and_gradients(criterion, model, inputs, number)
    assert theirs["loss"] > 0.01
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **EQUAL, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["exact", "native"])
@pytest.mark.parametrize("kind", ["llama", "gpt2, tied", "mixtral, with its router's loss"])
def test_in_both_normalisations(name: str, kind: str) -> None:
    model = model_of(kind)
    windows = [
        batch_of([place % 3 != 0 for place in range(24)]),
        batch_of([place < 9 for place in range(24)]),
    ]
    with without_casts():
        theirs = gradient_of(model, windows, name=name)
        with in_chunks(model) as criterion:
            ours = gradient_of(model, windows, name=name, criterion=criterion)
    torch.testing.assert_close(ours, theirs, **EQUAL)


def test_a_micro_batch_without_labels_gives_every_weight_a_gradient_of_nothing() -> None:
    model = model_of("llama")
    model.zero_grad(set_to_none=True)
    with in_chunks(model) as criterion:
        gradient_of(model, [batch_of([True] * 24), batch_of([False] * 24)], criterion=criterion)
        whole = [parameter.grad.clone() for parameter in model.parameters()]
        alone, loss = gradient_of(model, [batch_of([False] * 24)], criterion=criterion)
        gradient_of(model, [batch_of([True] * 24)], criterion=criterion)
    assert loss == 0.0
    assert bool((alone == 0).all())
    for parameter, found in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, found, **EQUAL)


def test_shifted_labels_are_taken_as_they_are() -> None:
    model, inputs = model_of("llama"), batch_of([True] * 24)
    inputs["shift_labels"] = inputs["labels"].roll(3, dims=1)
    with without_casts():
        theirs = loss_and_gradients(Criterion(), model, inputs, None)
        with in_chunks(model) as criterion:
            ours = loss_and_gradients(criterion, model, inputs, None)
    torch.testing.assert_close(ours, theirs, **EQUAL)


def saved_values(criterion: Criterion, model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Count the values of the largest tensor that autograd keeps for the backward pass."""
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        criterion(model, inputs, None, traits=read_traits(model))
    return largest


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    model, inputs = model_of("llama"), batch_of([True] * 24)
    logits = ROWS * TOKENS * WORDS
    with in_chunks(model) as criterion:
        criterion(model, inputs, None, traits=read_traits(model))  # which tries the model
        assert saved_values(criterion, model, inputs) < logits / 2
    assert saved_values(Criterion(), model, inputs) >= logits


def test_no_logits_are_made() -> None:
    # In the operation's own words: the buffer of a chunk is the only place where logits are.
    made: list[tuple[int, ...]] = []
    model, inputs = model_of("llama"), batch_of([True] * 24)
    own = torch.empty

    def empty(*shape: Any, **named: Any) -> Tensor:
        found = own(*shape, **named)
        made.append(tuple(found.shape))
        return found

    with in_chunks(model) as criterion, pytest.MonkeyPatch.context() as patch:
        criterion(model, inputs, None, traits=read_traits(model))
        patch.setattr(torch, "empty", empty)
        criterion(model, inputs, None, traits=read_traits(model))
    assert (7, WORDS) in made
    assert max(shape[0] * shape[1] for shape in made if len(shape) == 2 and shape[1] == WORDS) == 7 * WORDS


def test_chunks_hold_as_much_as_the_hidden_states_or_some_millions_of_values() -> None:
    assert rows_at_a_time(4096, 4096, classes=128_000) == 131
    assert rows_at_a_time(1024, 64, classes=32_000) == 131
    assert rows_at_a_time(24, 16, classes=96) == 24
    assert rows_at_a_time(1, 1, classes=2**23) == 1
