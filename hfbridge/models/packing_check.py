"""Check that a model isolates the samples of a packed sequence.

Positions that restart at 0 mark where samples begin. Some models make an attention mask of them; others
attend across the border, and recurrent ones keep their state. A few forwards measure it: a sample's logits
must be equal, but for rounding, after two samples, and with and without another sample or its positions.
Rounding is what they change by when another sample follows, which no causal model can see.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import unwrap_peft_model

from hfbridge.errors import ModelError
from hfbridge.models.probing import Inputs, probe_mode

_TOKENS = 8
_CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def check_class(model: nn.Module, *, packs_per_batch: int) -> None:
    """Check that a model's class and attention support packing.

    Args:
        model: the Hugging Face model.
        packs_per_batch: packed sequences of a micro-batch.

    Raises:
        ModelError: they do not.
    """
    base = unwrap_peft_model(model)
    name, config = type(base).__name__, getattr(base, "config", None)
    if not is_causal_lm(base):
        raise ModelError(
            f"packing= was given, and {name} is no causal language model. Packing is for the classes of "
            "AutoModelForCausalLM; leave packing out."
        )
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ModelError(
            _unsupported(name, "its forward takes no position_ids, which separate packed samples")
        )
    if getattr(config, "use_cache", False):
        raise ModelError(
            f"packing= was given, and use_cache=True: with a cache {name} ignores the positions "
            "that separate packed samples. Leave the setting use_cache out."
        )
    peft: Any = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise ModelError(
            _unsupported(
                name, "PEFT puts its prompt before each sequence, not each sample, and drops position_ids"
            )
        )
    attention = str(getattr(config, "_attn_implementation", ""))
    if "flash" in attention and packs_per_batch > 1:
        raise ModelError(
            f"attn_implementation={attention!r} separates packed samples only in micro-batches of one "
            f"sequence. Set per_device_train_batch_size=1 and {packs_per_batch} times the "
            "gradient_accumulation_steps, or attn_implementation='sdpa'."
        )


def check_packing_isolation(model: nn.Module, input_ids: Tensor, *, packed_by: str = "packing=") -> None:
    """Check by a few forwards in eval mode that the model isolates packed samples.

    Random generators, gradients and train modes are restored. Models without token logits are not
    checked.

    Args:
        model: the Hugging Face model on its device.
        input_ids: of a micro-batch, [packs, tokens].
        packed_by: what packs, for the message.

    Raises:
        ModelError: it does not.

    Proved by: tests/unit/models/test_packing_check.py
    """
    base, logits_of = unwrap_peft_model(model), _logits_of(model)
    with probe_mode(model):
        first = logits_of(input_ids[:1, :_TOKENS], None)
        if first is None or first.dim() != 3 or first.shape[1] != input_ids[:1, :_TOKENS].shape[1]:
            return
        influence, distance, shift, noise, scale = measure(logits_of, input_ids)
    if not is_causal_lm(base):  # which sees what follows a sample, too
        noise = 0.0
    rounding, reason = 16 * (noise + scale * torch.finfo(torch.float32).eps), ""
    # Other lengths are other sums: more than one rounding. A wrong position shows as a tenth of the scale.
    if influence > rounding:
        reason = f"a sample's logits change by {influence:.1e} with the sample before it"
    elif max(distance, shift) > rounding + 1e-3 * scale:
        reason = f"a sample's logits differ by {max(distance, shift):.1e} from those it has alone"
    if reason:
        raise ModelError(_unsupported(type(base).__name__, reason, packed_by))


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model's class is one of AutoModelForCausalLM."""
    return any(kind.__name__ in _CAUSAL_LM_NAMES for kind in type(model).__mro__)


def is_packed(inputs: Inputs) -> bool:
    """Whether a micro-batch is packed: its positions restart, and it has no padding."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or "attention_mask" in inputs:
        return False
    return bool((positions[:, 1:] == 0).any())


def measure(
    logits_of: Callable[[Tensor, Tensor | None], Any], input_ids: Tensor
) -> tuple[float, float, float, float, float]:
    """Measure by how much a sample's logits change, at most.

    Returns:
        By another sample before it; by being packed; by its positions; by rounding; and the largest logit.
    """
    ids = input_ids.flatten()
    places = torch.arange(2 * _TOKENS, device=ids.device) % len(ids)
    first, example = ids[places][None].split(_TOKENS, dim=1)
    positions = torch.arange(_TOKENS, device=ids.device)[None]
    twice = positions.repeat(1, 2)
    alone = logits_of(example, positions)
    after = logits_of(torch.cat([first, example], 1), twice)[:, _TOKENS:]
    after_other = logits_of(torch.cat([_others(first), example], 1), twice)[:, _TOKENS:]
    before = logits_of(torch.cat([example, first], 1), twice)[:, :_TOKENS]
    pairs = ((after, after_other), (after, alone), (logits_of(example, None), alone), (before, alone))
    influence, distance, shift, noise = (float((one - other).abs().max()) for one, other in pairs)
    return influence, distance, shift, noise, float(alone.abs().max())


def _others(ids: Tensor) -> Tensor:
    """Return other ids that the model has."""
    moved = ids.roll(1, dims=1)
    return torch.where(moved == ids, ids.min(), moved) if bool((ids != ids[:, :1]).any()) else ids * 0


def _logits_of(model: nn.Module) -> Callable[[Tensor, Tensor | None], Any]:
    def logits(ids: Tensor, positions: Tensor | None) -> Any:
        given = {} if positions is None else {"position_ids": positions}
        outputs = model(input_ids=ids, **given)
        found = outputs.get("logits") if isinstance(outputs, Mapping) else None
        return found.float() if isinstance(found, Tensor) else None

    return logits


def _unsupported(name: str, reason: str, packed_by: str = "packing=") -> str:
    return (
        f"{packed_by} cannot be used with {name}: {reason}. Leave it out, or use a model whose attention "
        "mask follows its positions, as those of Llama, GPT-2, Mistral, Qwen, Gemma, Phi and GPT-NeoX do."
    )
