"""Adapters on weights that are loaded quantised, as far as the machine can: native beside hfbridge."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTQConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hfbridge
from hfbridge import HFDataModule, HFModule, ModelError
from tests.parity.engines import BASE, same, without_times
from tests.parity.test_adapters import write_model
from tests.tiny import PadRows, make_rows

pytestmark = [
    # peft asks by a name of transformers 4.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # bitsandbytes casts inputs of its 8-bit layers, and says so.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

SETTINGS: dict[str, Any] = {**BASE, "max_steps": 3, "gradient_accumulation_steps": 2, "report_to": "none"}
METHODS = ["bitsandbytes-8", "bitsandbytes-4", "torchao"]


def quantization(method: str) -> Any:
    """Make the configuration of a method; a package that is not there skips the test."""
    if method == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=method.endswith("8"), load_in_4bit=method.endswith("4"))


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def data() -> HFDataModule:
    return HFDataModule(train_dataset=make_rows("llama", 24), data_collator=PadRows())


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_as_natively(method: str) -> None:
    folder = write_model("llama")
    set_seed(42)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization(method), dtype=torch.float32
    )
    theirs = Trainer(
        get_peft_model(loaded, lora()),
        TrainingArguments(**SETTINGS),
        train_dataset=make_rows("llama", 24),
        data_collator=PadRows(),
    )
    theirs.train()
    module = HFModule(
        folder,
        "AutoModelForCausalLM",
        model_kwargs={"quantization_config": quantization(method)},
        dtype=torch.float32,
        peft_config=lora(),
        loss_normalization="native",
    )
    trainer = hfbridge.Trainer(SETTINGS, logger=False, enable_model_summary=False)
    trainer.fit(module, data())
    rows = [[without_times(row) for row in log] for log in (theirs.state.log_history, trainer.log_history)]
    same("rows", *rows)
    same("adapters", trained(theirs.model), trained(module.model))
    assert all(tensor.abs().sum() > 0 for name, tensor in trained(module.model).items() if "lora_B" in name)
    counts = module.run.parameters
    assert (counts.trained, counts.total) == theirs.model.get_nb_trainable_parameters()
    module.save_pretrained("adapter")


def test_quantized_weights_alone_are_refused_as_natively() -> None:
    folder, config = write_model("llama"), quantization("bitsandbytes-8")
    module = HFModule(folder, "AutoModelForCausalLM", model_kwargs={"quantization_config": config})
    trainer = hfbridge.Trainer(SETTINGS, logger=False, enable_model_summary=False)
    with pytest.raises(ModelError, match="quantised by bitsandbytes, and its weights are not trained"):
        trainer.fit(module, data())
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(module.model, TrainingArguments(**SETTINGS))


def test_what_the_machine_cannot_is_named() -> None:
    config = GPTQConfig(bits=4, dataset=["some text"], tokenizer="none")
    arguments = {"model_kwargs": {"quantization_config": config}, "peft_config": lora()}
    module = HFModule(write_model("llama"), "AutoModelForCausalLM", **arguments)
    with pytest.raises((ModelError, hfbridge.MissingDependencyError), match="quantization_config=gptq"):
        module.configure_model()
