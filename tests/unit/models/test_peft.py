"""Adapters by configuration: what is wrong is named before training, what is trained is counted."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch import nn

import hfbridge
from hfbridge import BridgeWarning, HFDataModule, HFModule, MissingDependencyError, ModelError
from hfbridge.models.peft import ParameterCounts, count_parameters, merged, with_adapters
from tests.tiny import PadRows, make_model, make_rows

pytestmark = [
    # peft asks by a name of transformers 4.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2}


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_lin"], "task_type": "SEQ_CLS", **more})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"r": 4}, "has no peft_type; there are .*LORA"),
        ({"peft_type": "LORRA"}, "unknown peft_type 'LORRA'; did you mean .*LORA"),
        ({"peft_type": "lora"}, "did you mean .*LORA"),
        (
            {**LORA, "target_module": ["q"]},
            "unknown field 'target_module' for LORA; did you mean target_modules",
        ),
        ({**LORA, "task_type": "SEQUENCE"}, "peft_config: Invalid task type: 'SEQUENCE'"),
        ({**LORA, "task_type": "CAUSAL_LM"}, "DistilBertForSequenceClassification is for SEQ_CLS"),
        ("lora", "peft_config='lora'; it may be a configuration of PEFT"),
        (LoraConfig, "it may be a configuration of PEFT"),
        (PeftConfig(), "without peft_type"),
        (LoraConfig(inference_mode=True), "inference_mode=True"),
    ],
)
def test_a_wrong_configuration_is_named_at_once(given: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        HFModule(make_model("distilbert"), peft_config=given)


def test_a_task_that_is_not_the_auto_class_s_is_named_before_loading() -> None:
    with pytest.raises(ModelError, match="task_type='SEQ_CLS', and AutoModelForCausalLM is for CAUSAL_LM"):
        HFModule("gpt2", "AutoModelForCausalLM", peft_config=lora())


def test_a_task_fits_the_class_of_several_tables() -> None:
    config = lora(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    assert isinstance(HFModule(make_model("t5"), peft_config=config), HFModule)


@pytest.mark.parametrize("adds_itself", [True, False])
def test_adapters_on_adapters_are_refused(adds_itself: bool) -> None:
    model: Any = make_model("distilbert")
    if adds_itself:
        model.add_adapter(lora(task_type=None))
    else:
        model = get_peft_model(model, lora())
    with pytest.raises(ModelError, match="has some already"):
        HFModule(model, peft_config=lora())
    with pytest.raises(ModelError, match="has some already"):
        HFModule(lambda: model, peft_config=lora()).configure_model()


def test_a_folder_with_an_adapter_is_refused_before_loading(tmp_path: Path) -> None:
    get_peft_model(make_model("distilbert"), lora()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds an adapter, and peft_config would put another one on it"):
        HFModule(tmp_path, "AutoModelForSequenceClassification", peft_config=lora())


def test_layers_that_are_not_there_are_named() -> None:
    module = HFModule(make_model("distilbert"), peft_config=lora(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"target_modules=\{'q_proj'\}.*(\n.*)*Layers that it has: .*q_lin"):
        module.configure_model()
    unknown = HFModule(nn.Sequential(nn.Linear(2, 2)), peft_config=LoraConfig(), compute_loss_func=print)
    with pytest.raises(ModelError, match="LoraConfig could not be put on Sequential"):
        unknown.configure_model()


def test_one_absent_layer_of_several_is_told() -> None:
    with pytest.warns(BridgeWarning, match="target_modules names v_proj, which DistilBert.* does not have"):
        with_adapters(make_model("distilbert"), lora(target_modules=["q_lin", "v_proj"]))


def test_a_head_that_is_not_trained_is_told() -> None:
    with pytest.warns(
        BridgeWarning, match="the head of DistilBert.* is not trained. Write task_type='SEQ_CLS'"
    ):
        with_adapters(make_model("distilbert"), lora(task_type=None))
    for more in ({"modules_to_save": []}, {"modules_to_save": ["classifier"]}):
        with_adapters(make_model("distilbert"), lora(task_type=None, **more))
    with_adapters(make_model("llama"), lora(task_type=None, target_modules=["q_proj"]))


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr("hfbridge.utilities.imports.importlib.import_module", absent)
    with pytest.raises(
        MissingDependencyError, match=r"peft_config= needs the package peft.*hfbridge\[peft\]"
    ):
        HFModule(make_model("distilbert"), peft_config=LORA)


def test_an_optimizer_of_the_model_below_is_refused() -> None:
    model = make_model("distilbert")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ModelError, match="optimizers holds the parameters of a model"):
        HFModule(model, peft_config=lora(), optimizers=(optimizer, None))


def test_the_user_s_configuration_is_left_alone() -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM")  # PEFT fills in the layers
    before = copy.deepcopy(config.to_dict())
    HFModule(make_model("llama"), peft_config=config).configure_model()
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["gpt2", "t5", "distilbert"])
def test_counts_are_peft_s(kind: str) -> None:
    model = make_model(kind)
    counts = count_parameters(model)
    assert counts == ParameterCounts(model.num_parameters(), model.num_parameters())
    targets = {"gpt2": ["c_proj"], "t5": ["q"], "distilbert": ["q_lin"]}[kind]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, fan_in_fan_out=kind == "gpt2"))
    counts = count_parameters(adapted)
    assert (counts.trained, counts.total) == adapted.get_nb_trainable_parameters()


def test_counts_read_as_peft_s(capsys: pytest.CaptureFixture[str]) -> None:
    adapted = get_peft_model(make_model("distilbert"), lora())
    adapted.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == str(count_parameters(adapted))


def test_the_older_kind_of_recomputation_is_refused_where_it_gives_no_gradients() -> None:
    settings = {
        "output_dir": "out",
        "use_cpu": True,
        "save_strategy": "no",
        "max_steps": 1,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    }
    rows = make_rows("llama", 8)

    def fit(model: Any, **more: Any) -> HFModule:
        module = HFModule(model, **more)
        trainer = hfbridge.Trainer(settings, logger=False, enable_model_summary=False)
        trainer.fit(module, HFDataModule(train_dataset=rows, data_collator=PadRows()))
        return module

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="use_reentrant=True, and the model's input embeddings are frozen"):
        fit(make_model("llama"), peft_config=config)
    ready = make_model("llama")
    ready.enable_input_require_grads()
    moved = fit(ready, peft_config=config).model.state_dict()
    assert all(tensor.abs().sum() > 0 for name, tensor in moved.items() if "lora_B" in name)


def test_what_cannot_be_merged_is_named() -> None:
    with pytest.raises(ModelError, match="this DistilBertForSequenceClassification has none"):
        merged(make_model("distilbert"))
    with pytest.raises(ModelError, match="PROMPT_TUNING adds to the inputs and changes no weights"):
        merged(
            get_peft_model(
                make_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            )
        )
    module = HFModule(make_model("distilbert"))
    with pytest.raises(ModelError, match="has none"):
        module.save_pretrained("out", merge=True)
