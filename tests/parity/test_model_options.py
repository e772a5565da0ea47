"""What settings do to the model and its loss: the native Trainer's numbers, to the bit.

Grade: exact. What is compared stands in tests/parity/engines.py.
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorForSeq2Seq, TrainingArguments
from transformers import Trainer as NativeTrainer

import hfbridge
from tests.parity.engines import BASE, Job, assert_identical, digest_metrics, run_both, run_ours, run_theirs
from tests.tiny import PadRows, make_model, make_rows, make_tokenizer

ACCUMULATED = {"gradient_accumulation_steps": 3, "eval_strategy": "epoch"}


def run(kind: str, settings: dict[str, Any], **job: Any) -> None:
    """Run both; see, too, that the setting does something."""
    theirs, _ = run_both(Job(kind, {**ACCUMULATED, **settings}, rows=30, **job))
    plain = run_theirs(Job(kind, ACCUMULATED, rows=30))
    assert theirs.steps[-2]["weights"] != plain.steps[-2]["weights"]


@pytest.mark.parametrize("kind", ["llama", "distilbert", "bert-token", "gpt2"])
def test_label_smoothing(kind: str) -> None:
    run(kind, {"label_smoothing_factor": 0.2})


def test_label_smoothing_of_an_encoder_decoder() -> None:
    # Without labels the model cannot make its decoder's inputs; the usual collator does.
    def collator() -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(make_tokenizer(), model=make_model("t5"))

    run_both(Job("t5", {**ACCUMULATED, "label_smoothing_factor": 0.2}, rows=30, collator=collator))


def test_label_smoothing_in_bf16() -> None:
    run("llama", {"label_smoothing_factor": 0.2, "bf16": True})


def test_label_smoothing_leaves_a_loss_without_labels_alone() -> None:
    theirs, _ = run_both(Job("bert-qa", {**ACCUMULATED, "label_smoothing_factor": 0.2}, rows=30))
    plain = run_theirs(Job("bert-qa", ACCUMULATED, rows=30))
    assert_identical(theirs, plain)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss that heeds the number of items."""
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def averaged(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss that ignores it."""
    return torch.nn.functional.cross_entropy(outputs.logits.float(), labels)


@pytest.mark.parametrize("function", [summed, averaged])
def test_a_loss_function_of_ones_own(function: Any) -> None:
    run_both(Job("distilbert", ACCUMULATED, rows=30, compute_loss_func=function))


def test_a_loss_function_wins_over_smoothing() -> None:
    settings = {**ACCUMULATED, "label_smoothing_factor": 0.2}
    theirs, _ = run_both(Job("distilbert", settings, rows=30, compute_loss_func=summed))
    plain = run_theirs(Job("distilbert", ACCUMULATED, rows=30, compute_loss_func=summed))
    assert_identical(theirs, plain)


@pytest.mark.parametrize("kind", ["llama", "distilbert", "gpt2", "bert-token"])
def test_noise_on_embeddings(kind: str) -> None:
    run(kind, {"neftune_noise_alpha": 5.0})


@pytest.mark.parametrize(
    "arguments", [None, {"use_reentrant": True}, {"every_n_layers": 2}, {"use_reentrant": False}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "distilbert", "gpt2", "bert-token"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_activation_checkpointing(kind: str, arguments: Any) -> None:
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": arguments}
    run_both(Job(kind, {**ACCUMULATED, **settings}, rows=30))


def test_activation_checkpointing_under_its_old_name() -> None:
    with pytest.warns(FutureWarning):
        theirs = run_theirs(Job("llama", {**ACCUMULATED, "gradient_checkpointing": True}, rows=30))
    ours = run_ours(Job("llama", {**ACCUMULATED, "gradient_checkpointing": True}, rows=30))
    assert_identical(theirs, ours)
    assert ours.module.model.is_activation_checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "distilbert"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKEND", "MODE"):  # transformers sets them for the rest of the process
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
    _, ours = run_both(Job(kind, {**ACCUMULATED, "torch_compile_backend": backend}, rows=30))
    assert not any("_orig_mod" in name for name in ours.weights)


@pytest.mark.slow
def test_compiled_with_label_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native Trainer forgets the shift of a compiled causal model; "native" does, "exact" does not."""
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
    settings = {"torch_compile_backend": "eager", "label_smoothing_factor": 0.2, "eval_strategy": "epoch"}
    job = Job("llama", settings, rows=16)
    theirs, ours = run_both(job)
    exact = run_ours(job, loss_normalization="exact")
    assert exact.log_history[0]["loss"] != ours.log_history[0]["loss"]
    plain = run_ours(job.with_settings(torch_compile_backend=None), loss_normalization="exact")
    assert exact.log_history[0]["loss"] == plain.log_history[0]["loss"]
    assert theirs.log_history[0] == ours.log_history[0]


@pytest.mark.parametrize("what", ["the model", "the module", "a Trainer's model"])
def test_a_model_that_is_passed_compiled(what: str) -> None:
    """It is trained compiled, and saved by the names of the module inside."""
    graphs: list[Any] = []
    torch._dynamo.reset()  # it compiles a function for so many models only

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    rows, settings = make_rows("distilbert", 16), {**BASE, "save_strategy": "epoch"}
    model = make_model("distilbert")
    compiled = torch.compile(model, backend=backend)
    data: Any = hfbridge.HFDataModule(train_dataset=rows, data_collator=PadRows())
    if what == "a Trainer's model":
        native = NativeTrainer(compiled, TrainingArguments(**settings), PadRows(), rows)
        trainer, module, data = hfbridge.from_trainer(native)
    else:
        module = hfbridge.HFModule(model if what == "the module" else compiled, loss_normalization="native")
        trainer = hfbridge.Trainer(settings)
    trainer.fit(torch.compile(module, backend=backend) if what == "the module" else module, data)
    assert graphs
    assert module.model is model
    assert AutoModelForSequenceClassification.from_pretrained("out/checkpoint-4").num_labels == 2
    theirs = NativeTrainer(
        torch.compile(make_model("distilbert"), backend=backend),
        TrainingArguments(**{**BASE, "output_dir": "native"}),
        PadRows(),
        rows,
    )
    theirs.train()
    expected = theirs.model._orig_mod.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    if what == "the module":
        assert trainer.validate(
            torch.compile(module, backend=backend), DataLoader(rows[:4], 4, collate_fn=PadRows())
        )


def test_a_compiled_module_of_the_users() -> None:
    module = torch.compile(Plain(), backend="eager")
    trainer = hfbridge.Trainer({**BASE, "max_steps": 2}, enable_checkpointing=False, logger=False)
    trainer.fit(module, DataLoader(torch.randn(8, 4), 2))
    assert trainer.global_step == 2


class Plain(pl.LightningModule):
    """A LightningModule of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("every", [1, 2])
def test_an_emptied_cache_changes_nothing(every: int) -> None:
    run_both(Job("distilbert", {**ACCUMULATED, "torch_empty_cache_steps": every}, rows=30))


@pytest.mark.parametrize("tokens", ["all", "non_padding", True])
def test_tokens_are_counted(tokens: Any) -> None:
    settings = {**ACCUMULATED, "include_num_input_tokens_seen": tokens}
    theirs, _ = run_both(Job("llama", settings, rows=30, processing_class=make_tokenizer()))
    assert theirs.log_history[-1]["num_input_tokens_seen"] > 100


def test_padding_tokens_are_told_by_the_tokenizer() -> None:
    def without_mask(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        from tests.tiny import PadRows

        return {name: v for name, v in PadRows()(rows).items() if name != "attention_mask"}

    settings = {**ACCUMULATED, "include_num_input_tokens_seen": "non_padding"}
    run_both(
        Job("llama", settings, rows=30, collator=lambda: without_mask, processing_class=make_tokenizer())
    )


def test_full_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        run_both(Job("distilbert", {**ACCUMULATED, "full_determinism": True}, rows=30))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("greater", [None, True, False])
def test_the_best_metric_is_kept(greater: bool | None) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "mean",
        "greater_is_better": greater,
        "eval_on_start": True,
    }
    theirs, _ = run_both(Job("distilbert", settings, rows=30))
    assert theirs.state["best_metric"] is not None


def with_float_masks() -> Any:
    """Make a model whose modules are given no bools, which transformers' debugger cannot look at."""
    model = make_model("distilbert")
    model.set_attn_implementation("eager")
    return model


def test_underflow_and_overflow_are_found() -> None:
    def build() -> Any:
        model = with_float_masks()
        with torch.no_grad():
            model.pre_classifier.weight.fill_(float("inf"))
        return model

    settings = {"debug": "underflow_overflow"}
    for run_one in (run_theirs, run_ours):
        with pytest.raises(ValueError, match="inf/nan"):
            run_one(Job("distilbert", settings, rows=8, eval_rows=0, model=build))


def test_a_look_for_overflow_changes_nothing_and_leaves_no_hooks() -> None:
    _, ours = run_both(
        Job("distilbert", {**ACCUMULATED, "debug": "underflow_overflow"}, rows=30, model=with_float_masks)
    )
    assert not any(module._forward_hooks for module in ours.module.model.modules())


@pytest.mark.parametrize("settings", [{"neftune_noise_alpha": 5.0}, {"bf16": True}], ids=str)
def test_the_model_is_given_back(settings: Any) -> None:
    ours = run_ours(Job("distilbert", settings, rows=8))
    model = ours.module.model
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward" not in vars(model)


def test_smoothing_of_several_labels_is_refused() -> None:
    def build() -> Any:
        model = make_model("distilbert")
        model.config.problem_type = "multi_label_classification"
        return model

    with pytest.raises(hfbridge.ModelError, match="multi-label"):
        run_ours(Job("distilbert", {"label_smoothing_factor": 0.1}, rows=8, model=build))


def with_kernel(model: Any, config: dict[str, float] | None) -> None:
    """Patch a model as Liger does; its config scales the loss, and without logits there is a loss alone."""
    plain = model.forward

    def forward(
        input_ids: Any = None, labels: Any = None, skip_logits: bool | None = None, **named: Any
    ) -> Any:
        outputs = plain(input_ids=input_ids, labels=labels, **named)
        model.skipped.add((model.training, skip_logits))
        loss = outputs.loss * (config or {}).get("scale", 1.0)
        return type(outputs)(loss=loss, logits=None if skip_logits else outputs.logits)

    model.forward, model.skipped = forward, set()


@pytest.mark.parametrize("metrics", [None, digest_metrics])
def test_liger_kernels(monkeypatch: pytest.MonkeyPatch, metrics: Any) -> None:
    # The package runs on GPUs only; what both engines do with it is the same, whatever it patches.
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", with_kernel)
    monkeypatch.setattr("hfbridge.models.preparation.apply_liger_kernel", with_kernel)
    monkeypatch.setattr("hfbridge.trainer.require_machine", lambda settings: None)
    on_gpu = {"use_cpu": False, "dataloader_pin_memory": False}
    settings = {**on_gpu, "use_liger_kernel": True, "liger_kernel_config": {"scale": 0.5}}
    theirs, ours = run_both(Job("distilbert", {**ACCUMULATED, **settings}, rows=30, compute_metrics=metrics))
    assert theirs.engine.model.skipped == {(True, None), (False, None if metrics else True)}
    # Ours is asked in eval mode how it counts, too, before it is trained.
    assert ours.module.model.skipped - {(False, None)} == theirs.engine.model.skipped - {(False, None)}
    plain = run_theirs(Job("distilbert", ACCUMULATED, rows=30, compute_metrics=metrics))
    assert theirs.log_history[0]["grad_norm"] != plain.log_history[0]["grad_norm"]


@pytest.mark.gpu
def test_liger_kernels_on_a_gpu() -> None:
    pytest.importorskip("liger_kernel")
    settings = {"use_cpu": False, "use_liger_kernel": True, "prediction_loss_only": True}
    run_both(Job("llama", {**ACCUMULATED, **settings}, rows=30))
