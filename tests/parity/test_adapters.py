"""PEFT: adapters drawn, trained, saved, resumed and merged, by the native Trainer and by hfbridge."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hfbridge import ModelError
from tests.parity.engines import (
    Job,
    assert_identical,
    make_ours,
    run_both,
    run_ours,
    run_theirs,
    same,
)
from tests.parity.test_checkpoints import assert_same_checkpoint, files_in, resume_both
from tests.tiny import make_model

pytestmark = [
    # peft asks by a name of transformers 4.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

SEED = {"seed": 31}
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Kind:
    """A kind of adapter and the model that it is put on."""

    model: str
    auto_class: Any
    config: Callable[[], PeftConfig]
    merges: bool = True


KINDS = {
    "lora": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: LoraConfig(r=4, lora_dropout=0.1, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    ),
    "lora-with-a-head": Kind(
        "distilbert",
        AutoModelForSequenceClassification,
        lambda: LoraConfig(r=4, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS"),
    ),
    "dora": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: LoraConfig(r=4, use_dora=True, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    ),
    "ia3": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
    "prompt-tuning": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        merges=False,
    ),
    "prefix-tuning": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        merges=False,
    ),
}


def write_model(kind: str, folder: str = "model") -> str:
    """Save a tiny model for `from_pretrained`."""
    if not Path(folder).exists():
        make_model(kind).save_pretrained(folder)
    return folder


def job_of(kind: Kind, folder: str, **settings: Any) -> Job:
    """Make the job: natively the usual workflow, and for hfbridge name and configuration."""

    def native() -> PeftModel:
        set_seed(SEED["seed"])
        model = kind.auto_class.from_pretrained(folder)
        adapted: PeftModel = get_peft_model(model, kind.config())
        return adapted

    return Job(
        kind.model,
        {**SEED, **settings},
        model=native,
        module_arguments=([folder, kind.auto_class], {"peft_config": kind.config()}),
    )


@pytest.mark.parametrize("name", KINDS)
def test_by_configuration(name: str) -> None:
    kind = KINDS[name]
    job = job_of(kind, write_model(kind.model), gradient_accumulation_steps=3, max_steps=3)
    theirs, ours = run_both(job)
    counts = ours.module.run.parameters
    assert (counts.trained, counts.total) == theirs.engine.model.get_nb_trainable_parameters()
    assert 0 < counts.trained < counts.total
    assert str(counts) in ours.module.notes
    trained = [n for n, p in ours.module.model.named_parameters() if p.requires_grad]
    set_seed(SEED["seed"])
    begun = dict(job.make_model().named_parameters())
    assert [n for n in trained if torch.equal(ours.weights[n], begun[n])] == []


def test_by_a_dictionary() -> None:
    kind = KINDS["lora"]
    job = job_of(kind, write_model("llama"), max_steps=2)
    fields = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": ATTENTION}
    as_dict = Job(
        "llama",
        job.settings,
        module_arguments=([*job.module_arguments[0]], {"peft_config": {**fields, "task_type": "CAUSAL_LM"}}),  # type: ignore[index]
    )
    assert_identical(run_theirs(job), run_ours(as_dict))


SAVED: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "learning_rate": 5e-2,
}
# Two kinds in each run of the tests: of weights in layers, with a head, and of prompts.
SHORT = [
    name if name in ("lora-with-a-head", "prompt-tuning") else pytest.param(name, marks=pytest.mark.long)
    for name in KINDS
]


def logits_of(model: Any) -> torch.Tensor:
    """Run a forward on rows of different lengths."""
    ids = torch.tensor([[3, 9, 12, 7, 30], [4, 8, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def base_of(kind: Kind) -> Any:
    return kind.auto_class.from_pretrained(write_model(kind.model))


@pytest.mark.parametrize("name", SHORT)
def test_checkpoints_and_going_on(name: str) -> None:
    kind = KINDS[name]
    job = job_of(kind, write_model(kind.model), **SAVED, load_best_model_at_end=True)
    theirs, ours = (
        run(job.with_settings(output_dir=f)) for run, f in ((run_theirs, "native"), (run_ours, "ours"))
    )
    assert files_in("native") == files_in("ours")
    assert "checkpoint-3/adapter_model.safetensors" in files_in("ours")
    assert "checkpoint-3/model.safetensors" not in files_in("ours")
    for step in (3, 6):
        assert_same_checkpoint(Path(f"native/checkpoint-{step}"), Path(f"ours/checkpoint-{step}"))
    same("weights of the best", theirs.weights, ours.weights)
    read = PeftModel.from_pretrained(base_of(kind), ours.state["best_model_checkpoint"])
    assert torch.equal(logits_of(read), logits_of(ours.module.model))

    again = job.with_settings(output_dir="again", save_strategy="no", load_best_model_at_end=False)
    native, resumed = resume_both(again, "ours/checkpoint-3")
    same("weights", native.weights, resumed.weights)
    same("optimizer of a run without a break", ours.optimizer, resumed.optimizer)
    trainer, module, data, *_ = make_ours(again)
    trainer.fit(module, data, ckpt_path="native/checkpoint-3")
    same("weights", dict(module.model.state_dict()), resumed.weights)


@pytest.mark.parametrize("name", SHORT)
def test_saving_and_merging(name: str) -> None:
    kind = KINDS[name]
    module = run_ours(job_of(kind, write_model(kind.model), max_steps=2, learning_rate=5e-2)).module
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    logits = logits_of(module.model)
    module.save_pretrained("adapter")
    assert not Path("adapter/model.safetensors").exists()
    read = PeftModel.from_pretrained(base_of(kind), "adapter")
    assert torch.equal(logits_of(read), logits)
    if kind.merges:
        module.save_pretrained("merged", merge=True)
        assert not Path("merged/adapter_config.json").exists()
        plain = kind.auto_class.from_pretrained("merged")
        assert not hasattr(plain, "peft_config")
        # The sums of a merged matrix are taken in another order.
        torch.testing.assert_close(logits_of(plain), logits, rtol=0, atol=1e-6)
        assert (logits_of(base_of(kind)) - logits).abs().max() > 1e-4
    else:
        with pytest.raises(ModelError, match="changes no weights"):
            module.save_pretrained("merged", merge=True)
    same("the trained model", before, dict(module.model.state_dict()))
    assert torch.equal(logits_of(module.model), logits)
