"""PEFT: adapters drawn, trained, saved, resumed and merged, by the native Trainer and by hfbridge."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hfbridge import BridgeWarning, CheckpointError, HFModule, ModelError, convert
from hfbridge.checkpoints.reader import read_all_weights
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
    # peft tells of each file that holds embeddings, under either engine.
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
    # Runs are resumed here without the ModelCheckpoint that wrote the file.
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning"),
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
    "lora-on-embeddings": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    ),
    "lora-with-biases": Kind(
        "distilbert",
        AutoModelForSequenceClassification,
        lambda: LoraConfig(r=4, target_modules=["q_lin", "v_lin"], bias="all", task_type="SEQ_CLS"),
    ),
    "lora-with-tokens": Kind(
        "llama",
        AutoModelForCausalLM,
        lambda: LoraConfig(
            r=4,
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
            trainable_token_indices=[3, 9],
            task_type="CAUSAL_LM",
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
# In each run of the tests: weights in layers, with a head or with weights of the model, and prompts.
SHORT = [
    name
    if name in ("lora-with-a-head", "lora-on-embeddings", "prompt-tuning")
    else pytest.param(name, marks=pytest.mark.long)
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


ENCODED = {
    "p-tuning": lambda: PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "prefix-tuning-with-projection": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
}


def fit_with_file(job: Job) -> Any:
    """Train, with a file of Lightning's beside the checkpoint in the middle."""
    trainer, module, data, *_ = make_ours(job)
    trainer.callbacks.append(ModelCheckpoint("kept", "{step}", every_n_train_steps=3, save_top_k=-1))
    trainer.fit(module, data)
    return module


@pytest.mark.parametrize("name", SHORT)
def test_a_file_of_lightning_holds_the_adapter_alone(name: str) -> None:
    kind = KINDS[name]
    job = job_of(kind, write_model(kind.model), **SAVED)
    module = fit_with_file(job.with_settings(output_dir="ours"))
    whole = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    stored = torch.load("kept/step=3.ckpt", weights_only=True)
    written = read_all_weights(Path("ours/checkpoint-3"))
    # With bias="all" PEFT's file has some twice.
    assert sum(t.numel() for t in stored["state_dict"].values()) <= sum(t.numel() for t in written.values())

    loaded = HFModule.load_from_checkpoint("kept/step=6.ckpt")
    same("loaded", whole, dict(loaded.model.state_dict()))
    again = job.with_settings(output_dir="again", save_strategy="no")
    trainer, module, data, *_ = make_ours(again)
    trainer.fit(module, data, ckpt_path="kept/step=3.ckpt")
    same("resumed", whole, dict(module.model.state_dict()))

    convert("kept/step=3.ckpt", "converted/checkpoint-3")
    assert files_in("converted/checkpoint-3") == files_in("ours/checkpoint-3")
    same("converted", written, read_all_weights(Path("converted/checkpoint-3")))
    read = PeftModel.from_pretrained(base_of(kind), "converted/checkpoint-3")
    same(
        "read",
        dict(read.state_dict()),
        dict(PeftModel.from_pretrained(base_of(kind), "ours/checkpoint-3").state_dict()),
    )
    for record in resume_both(again, "converted/checkpoint-3"):
        same("resumed from what was converted", whole, record.weights)
    convert("converted/checkpoint-3", "back.ckpt")
    trainer, module, data, *_ = make_ours(again)
    trainer.fit(module, data, ckpt_path="back.ckpt")
    same("resumed from what was converted back", whole, dict(module.model.state_dict()))


@pytest.mark.parametrize("name", ENCODED)
def test_prompts_of_an_encoder(name: str) -> None:
    kind = Kind("llama", AutoModelForCausalLM, ENCODED[name])
    job = job_of(kind, write_model("llama"), **SAVED)
    with pytest.raises(CheckpointError, match="load_best_model_at_end=True"):
        run_ours(job.with_settings(load_best_model_at_end=True))
    with pytest.warns(BridgeWarning, match="not held by checkpoints"):
        module = fit_with_file(job.with_settings(output_dir="ours"))
    again = job.with_settings(output_dir="again", save_strategy="no")
    trainer, resumed, data, *_ = make_ours(again)
    trainer.fit(resumed, data, ckpt_path="kept/step=3.ckpt")
    same("resumed", dict(module.model.state_dict()), dict(resumed.model.state_dict()))
    convert("kept/step=6.ckpt", "converted")
    read = PeftModel.from_pretrained(base_of(kind), "converted")
    # Sums of an encoder over other numbers of prompts are taken in another order.
    torch.testing.assert_close(logits_of(read), logits_of(module.model), rtol=0, atol=1e-6)
    same("prompts", *(read_all_weights(Path(folder)) for folder in ("ours/checkpoint-6", "converted")))
    trainer, module, data, *_ = make_ours(again)
    with pytest.raises(CheckpointError, match="prompts that an encoder has made"):
        trainer.fit(module, data, ckpt_path="ours/checkpoint-3")


def with_larger_vocabulary() -> PeftModel:
    set_seed(SEED["seed"])
    model = base_of(KINDS["lora"])
    model.resize_token_embeddings(60)
    return get_peft_model(model, KINDS["lora"].config())


def test_a_resized_vocabulary() -> None:
    write_model("llama")
    job = Job("llama", {**SEED, **SAVED}, model=with_larger_vocabulary)
    best = job.with_settings(load_best_model_at_end=True)
    theirs = run_theirs(best.with_settings(output_dir="native"))
    ours = run_ours(best.with_settings(output_dir="ours"))
    assert_same_checkpoint(Path("native/checkpoint-3"), Path("ours/checkpoint-3"))
    assert "base_model.model.lm_head.weight" in read_all_weights(Path("ours/checkpoint-3"))
    same("weights of the best", theirs.weights, ours.weights)
    ours.module.save_pretrained("adapter")
    again = job.with_settings(output_dir="again", save_strategy="no")
    for folder in ("native", "ours"):
        native, resumed = resume_both(again, f"{folder}/checkpoint-3")
        same("weights", native.weights, resumed.weights)


def adding_an_adapter() -> Any:
    set_seed(SEED["seed"])
    model = base_of(KINDS["lora"])
    model.add_adapter(KINDS["lora"].config())
    return model


def test_an_adapter_that_the_model_has_added() -> None:
    write_model("llama")
    job = Job("llama", {**SEED, **SAVED}, model=adding_an_adapter)
    theirs = run_theirs(job.with_settings(output_dir="native"))
    module = fit_with_file(job.with_settings(output_dir="ours"))
    assert_same_checkpoint(Path("native/checkpoint-3"), Path("ours/checkpoint-3"))
    same("weights", theirs.weights, dict(module.model.state_dict()))
    again = job.with_settings(output_dir="again", save_strategy="no")
    convert("kept/step=3.ckpt", "converted/checkpoint-3")
    assert files_in("converted/checkpoint-3") == files_in("ours/checkpoint-3")
    for checkpoint in ("native/checkpoint-3", "kept/step=3.ckpt", "converted/checkpoint-3"):
        trainer, resumed, data, *_ = make_ours(again)
        trainer.fit(resumed, data, ckpt_path=checkpoint)
        same(checkpoint, theirs.weights, dict(resumed.model.state_dict()))
    best = run_ours(job.with_settings(output_dir="best", load_best_model_at_end=True))
    logits = logits_of(best.module.model)
    read = base_of(KINDS["lora"])
    read.load_adapter(best.state["best_model_checkpoint"])
    assert torch.equal(logits_of(read), logits)
    best.module.save_pretrained("adapter")
    best.module.save_pretrained("merged", merge=True)
    assert not Path("merged/adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits_of(merged), logits, rtol=0, atol=1e-6)
    assert (logits_of(base_of(KINDS["lora"])) - logits).abs().max() > 1e-4


def two_adapters() -> PeftModel:
    set_seed(SEED["seed"])
    model = get_peft_model(base_of(KINDS["lora"]), KINDS["lora"].config())
    model.add_adapter("second", KINDS["lora"].config())
    model.set_adapter("second")
    return model


def test_the_second_of_two_adapters() -> None:
    write_model("llama")
    job = Job("llama", {**SEED, **SAVED}, model=two_adapters)
    theirs = run_theirs(job.with_settings(output_dir="native"))
    module = fit_with_file(job.with_settings(output_dir="ours"))
    assert files_in("native") == files_in("ours")
    same("weights", theirs.weights, dict(module.model.state_dict()))
    again = job.with_settings(output_dir="again", save_strategy="no")
    convert("kept/step=3.ckpt", "converted/checkpoint-3")
    assert files_in("converted/checkpoint-3") == files_in("ours/checkpoint-3")
    native, resumed = resume_both(again, "converted/checkpoint-3")
    same("weights of a resumed run", native.weights, resumed.weights)
    same("weights of a run without a break", theirs.weights, resumed.weights)
    module.save_pretrained("adapter")
    same("saved", *(read_all_weights(Path(folder)) for folder in ("ours/checkpoint-6", "adapter")))


def test_weights_that_peft_does_not_save_are_named_before_training() -> None:
    def unfrozen() -> PeftModel:
        model = get_peft_model(base_of(KINDS["lora"]), KINDS["lora"].config())
        model.base_model.model.model.norm.weight.requires_grad_(True)
        return model

    write_model("llama")
    job = Job("llama", {**SEED, **SAVED}, model=unfrozen)
    with pytest.warns(BridgeWarning, match=r"model\.norm\.weight.*modules_to_save"):
        module = fit_with_file(job.with_settings(output_dir="ours"))
    trainer, resumed, data, *_ = make_ours(job.with_settings(output_dir="again", save_strategy="no"))
    trainer.fit(resumed, data, ckpt_path="kept/step=3.ckpt")
    same("resumed", dict(module.model.state_dict()), dict(resumed.model.state_dict()))
