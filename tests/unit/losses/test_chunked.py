"""Which models and settings a loss in chunks is refused for, by name; and where it stays away."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hfbridge import ModelError
from hfbridge.losses.chunked import ChunkedLoss, check_chunked, logits_kept
from hfbridge.losses.criterion import OWN_LOSS, Criterion
from hfbridge.losses.item_counts import read_traits
from hfbridge.models.autocast import wrap_forward
from tests.tiny import IGNORED, VOCABULARY, make_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def arguments(**more: Any) -> Any:
    return SimpleNamespace(**{"label_smoothing_factor": 0.0, "use_liger_kernel": False, **more})


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.where(ids % 5 == 0, IGNORED, ids)}


def losses_of(model: nn.Module, criterion: Criterion) -> Tensor:
    loss, _ = criterion(model, batch(), None, traits=read_traits(model))
    return loss


class Bent(hf.LlamaForCausalLM):
    """Bends its logits in place, which leaves them the same object."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda head, given, logits: logits.tanh_())


class Penalised(hf.LlamaForCausalLM):
    """Adds to its loss what it computes of all logits."""

    def forward(self, *given: Any, **named: Any) -> Any:
        outputs = super().forward(*given, **named)
        outputs.loss = outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


def llama(cls: Any = hf.LlamaForCausalLM) -> nn.Module:
    hf.set_seed(1)
    return cls(hf.LlamaConfig(**_SIZES))  # type: ignore[no-any-return]


def of(cls: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: cls(config)


def with_lora(**more: Any) -> Callable[[], Any]:
    return lambda: peft.get_peft_model(llama(), peft.LoraConfig(r=2, **more))  # type: ignore[arg-type]


def with_own_loss() -> nn.Module:
    model: Any = llama()
    model.loss_function = lambda logits, labels, **named: logits.square().mean()
    return model


AT_ONCE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no vocabulary": (lambda: make_model("distilbert"), "its loss is not transformers' own for causal"),
    "a function of its own": (with_own_loss, "its loss is not transformers' own for causal"),
    "lora on the head": (with_lora(target_modules=["q_proj", "lm_head"]), "its head is a peft.*, not nn.Lin"),
    "a head trained beside": (
        with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "its head is a peft.*ModulesToSaveWrapper",
    ),
}
TRIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gemma2": (
        of(hf.Gemma2ForCausalLM, hf.Gemma2Config(**_SIZES, head_dim=8, attn_implementation="eager")),
        r"Gemma2ForCausalLM: its forward changes the logits \(caps",
    ),
    "cohere": (
        of(hf.CohereForCausalLM, hf.CohereConfig(**_SIZES, pad_token_id=0)),
        "CohereForCausalLM: its forward changes the logits",
    ),
    "granite": (of(hf.GraniteForCausalLM, hf.GraniteConfig(**_SIZES)), "Granite.*: its forward changes the"),
    "t5": (lambda: make_model("t5"), "T5.*: its forward does not call its loss_function"),
    "bert": (lambda: make_model("bert-mlm"), "BertForMaskedLM: its forward does not call its loss_function"),
    "in place": (lambda: llama(Bent), "Bent: the loss of a sample would be"),
    "penalised": (lambda: llama(Penalised), "Penalised: the loss of a sample would be"),
}


@pytest.mark.parametrize("name", list(AT_ONCE))
def test_refused_when_the_model_is_there(name: str) -> None:
    make, reason = AT_ONCE[name]
    with pytest.raises(ModelError, match=f"chunked_loss=True cannot be used with .*: {reason}"):
        ChunkedLoss(make(), arguments())


@pytest.mark.parametrize("name", list(TRIED))
def test_refused_by_a_forward_of_one_row(name: str) -> None:
    make, reason = TRIED[name]
    model = make()
    before = losses_of(model.eval(), OWN_LOSS)
    chunked = ChunkedLoss(model, arguments())
    with pytest.raises(ModelError, match=f"chunked_loss=True cannot be used with {reason}"):
        losses_of(model, Criterion(chunked=chunked))
    chunked.undo()
    assert torch.equal(losses_of(model, OWN_LOSS), before)


@pytest.mark.parametrize(
    ("settings", "is_sharded", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, False, "label_smoothing_factor=0.1"),
        ({"use_liger_kernel": True}, False, "use_liger_kernel=True"),
        ({}, True, "under DeepSpeed's stage 3"),
    ],
)
def test_refused_for_settings(settings: Any, is_sharded: bool, reason: str) -> None:
    with pytest.raises(ModelError, match=f"LlamaForCausalLM: {reason}"):
        ChunkedLoss(llama(), arguments(**settings), is_sharded=is_sharded)


def test_refused_as_an_argument() -> None:
    with pytest.raises(ModelError, match="chunked_loss=4; it must be True or False"):
        check_chunked(4, has_function=False)
    with pytest.raises(ModelError, match="and compute_loss_func is given logits"):
        check_chunked(True, has_function=True)


def test_a_model_is_left_to_itself_elsewhere_and_afterwards() -> None:
    model = llama().eval()
    own, plain = losses_of(model, OWN_LOSS), dict(vars(model))
    logits = model(**batch()).logits
    chunked = ChunkedLoss(model, arguments())
    criterion = Criterion(chunked=chunked)
    assert torch.equal(model(**batch()).logits, logits)
    assert torch.equal(losses_of(model, OWN_LOSS), own)
    loss, outputs = criterion(model, batch(), None, traits=read_traits(model))
    assert set(outputs) == {"loss", "summed_loss", "hidden_states"}
    torch.testing.assert_close(loss, own)
    with logits_kept(chunked, keeps=True):
        _, outputs = criterion(model, batch(), None, traits=read_traits(model))
        assert torch.equal(outputs.logits, logits)
    chunked.undo()
    chunked.undo()
    assert vars(model) == plain
    assert "forward" not in vars(model.lm_head)


def test_a_loss_function_that_was_set_is_given_back() -> None:
    model: Any = llama()
    model.loss_function = own = model.loss_function
    chunked = ChunkedLoss(model, arguments())
    assert model.loss_function != own
    chunked.undo()
    assert model.loss_function is own


def test_a_failed_forward_leaves_the_model_to_itself() -> None:
    model = llama()
    chunked = ChunkedLoss(model, arguments())
    criterion = Criterion(chunked=chunked)
    losses_of(model, criterion)
    hook = model.model.layers[0].register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses_of(model, criterion)
    hook.remove()
    assert model(**batch()).logits.shape[-1] == VOCABULARY


def test_adapters_elsewhere_are_taken() -> None:
    model = with_lora(target_modules=["q_proj"])()
    own = losses_of(model, OWN_LOSS)
    own.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = losses_of(model, Criterion(chunked=ChunkedLoss(model, arguments())))
    found.backward()
    torch.testing.assert_close(found, own)
    assert gradients
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-8)
    assert model.base_model.model.lm_head.weight.grad is None


def test_under_autocast_the_loss_is_in_float32() -> None:
    model = llama()
    wrap_forward(model, device_type="cpu", dtype=torch.bfloat16)
    own = losses_of(model, OWN_LOSS)
    own.backward()
    theirs = model.lm_head.weight.grad.clone()
    model.zero_grad()
    found = losses_of(model, Criterion(chunked=ChunkedLoss(model, arguments())))
    found.backward()
    assert found.dtype is torch.float32
    # The model rounds its logits to bfloat16, of 8 bits; the same products are not rounded here.
    torch.testing.assert_close(found, own, rtol=2e-3, atol=0.0)
    distance = (model.lm_head.weight.grad - theirs).norm() / theirs.norm()
    assert distance < 1e-2


def test_weights_in_bfloat16() -> None:
    model = llama().bfloat16()
    own = losses_of(model, OWN_LOSS)
    found = losses_of(model, Criterion(chunked=ChunkedLoss(model, arguments())))
    found.backward()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, own, rtol=2e-3, atol=0.0)
    assert model.lm_head.weight.grad.dtype is torch.bfloat16


@pytest.mark.slow
def test_compiled() -> None:
    model = llama()
    own = losses_of(model, OWN_LOSS)
    own.backward()
    theirs = model.lm_head.weight.grad.clone()
    model.zero_grad()
    criterion = Criterion(chunked=ChunkedLoss(model, arguments()))
    losses_of(model, criterion)
    found = losses_of(torch.compile(model, backend="aot_eager"), criterion)  # type: ignore[arg-type]
    found.backward()
    torch.testing.assert_close(found, own)
    torch.testing.assert_close(model.lm_head.weight.grad, theirs)
