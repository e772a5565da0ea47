"""Which models keep packed examples apart: by their logits, packed and alone."""

from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from hfbridge import ModelError
from hfbridge.data.packing import PackCollator, Packed
from hfbridge.models.packing_check import check_class, check_packing_isolation
from tests.tiny import VOCABULARY, make_model, make_rows

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
APART: dict[str, hf.PreTrainedConfig] = {
    "llama": hf.LlamaConfig(**_GROUPED),
    "gpt2": hf.GPT2Config(**_GPT),
    "mistral": hf.MistralConfig(**_GROUPED, sliding_window=4),
    "qwen2": hf.Qwen2Config(**_GROUPED),
    "qwen3": hf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": hf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4),
    "phi": hf.PhiConfig(**_SIZES),
    "mixtral": hf.MixtralConfig(**_GROUPED, num_local_experts=2),
    "gpt_neox": hf.GPTNeoXConfig(**_SIZES),
    "gptj": hf.GPTJConfig(**_GPT, rotary_dim=4),
}
# What tells examples apart is missing in each of these in another way.
LEAKING: dict[str, tuple[hf.PreTrainedConfig, str]] = {
    "opt": (
        hf.OPTConfig(**{**_SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}),
        "change by .* with the sample before",
    ),
    "falcon": (hf.FalconConfig(**_SIZES), "change by .* with the sample before"),
    "bert": (hf.BertConfig(**_SIZES, is_decoder=True), "change by .* with the sample before"),
    "lfm2": (hf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]), "change by"),
    "recurrent_gemma": (
        hf.RecurrentGemmaConfig(**_GROUPED, lru_width=16, attention_window_size=4),
        "change by",
    ),
    "bloom": (hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2), "no position_ids"),
    "mamba": (
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4),
        "no position_ids",
    ),
}
_EAGER_ONLY = ("gemma2", "gptj", "bloom", "mamba")  # the others have sdpa, too


def with_attentions(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(n, kind) for n in names for kind in ("eager", "sdpa") if kind == "eager" or n not in _EAGER_ONLY]


def model_of(config: hf.PreTrainedConfig, attention: str = "eager") -> Any:
    hf.set_seed(7)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.config.use_cache = False  # as the setting use_cache, which is off by default, makes it
    return model


def check(model: nn.Module) -> None:
    check_class(model, packs_per_batch=2)
    check_packing_isolation(
        model, torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
    )


@pytest.mark.parametrize(("name", "attention"), with_attentions(APART))
@torch.no_grad()
def test_a_packed_example_has_the_logits_it_has_alone(name: str, attention: str) -> None:
    model = model_of(APART[name], attention)
    check(model)
    packed = Packed(make_rows(name, 9), 30)
    batch = PackCollator()([packed[i] for i in range(len(packed))])
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    examples = make_rows(name, 9)
    for row, pack in enumerate(packed.packs):
        start = 0
        for example in pack:
            ids = torch.tensor([examples[example]["input_ids"]])
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            # Not to the bit: sums over keys are taken over the whole row, in other blocks; one rounding.
            torch.testing.assert_close(logits[row, start : start + len(alone)], alone, rtol=0, atol=1e-6)
            start += len(alone)
        assert start == sum(len(examples[i]["input_ids"]) for i in pack)


@pytest.mark.parametrize(("name", "attention"), with_attentions(LEAKING))
def test_a_model_that_would_leak_is_refused_by_name(name: str, attention: str) -> None:
    config, told = LEAKING[name]
    model = model_of(config, attention)
    with pytest.raises(ModelError, match=rf"packing= cannot be used with {type(model).__name__}: .*{told}"):
        check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_in_other_dtypes_is_no_leak(dtype: torch.dtype) -> None:
    if dtype != torch.float64:  # of which torch multiplies no groups
        check(model_of(APART["mixtral"], "sdpa").to(dtype))
    check(model_of(APART["gpt2"], "sdpa").to(dtype))
    with pytest.raises(ModelError, match="with the sample before"):
        check(model_of(LEAKING["falcon"][0]).to(dtype))


def test_autocast_is_no_leak() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(model_of(APART["mixtral"]))


def test_a_model_that_counts_its_positions_otherwise_is_refused() -> None:
    """As RoBERTa, whose first position is 2."""

    class Shifted(hf.GPT2LMHeadModel):
        def forward(self, input_ids: Any, position_ids: Any = None, **inputs: Any) -> Any:  # type: ignore[override]
            if position_ids is None:
                position_ids = torch.arange(2, input_ids.shape[1] + 2)[None]
            return super().forward(input_ids, position_ids=position_ids, **inputs)

    hf.set_seed(7)
    model = Shifted(hf.GPT2Config(**_GPT, use_cache=False))
    with pytest.raises(ModelError, match=r"Shifted: a sample's logits differ by .* from those it has alone"):
        check(model)


def test_nothing_of_a_model_is_changed() -> None:
    model = make_model("llama")
    model.train()
    next(model.children()).eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    model.config.use_cache = False
    check(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="Leave the setting use_cache out"):
        check(make_model("llama"))


def test_only_causal_language_models_are_packed() -> None:
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is no causal language model"):
        check(make_model("t5"))


def test_flash_attention_takes_one_pack_at_a_time() -> None:
    model = model_of(APART["llama"])
    model.config._attn_implementation_internal = "flash_attention_2"
    check_class(model, packs_per_batch=1)
    with pytest.raises(ModelError, match=r"Set per_device_train_batch_size=1"):
        check_class(model, packs_per_batch=2)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
def test_prompts_of_peft_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(model_of(APART["llama"]), config)
    with pytest.raises(ModelError, match="PEFT puts its prompt before each sequence"):
        check(prompted)
