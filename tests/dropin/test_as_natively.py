"""What transformers' own suite looks at beside numbers and events: logs, odd checkpoints, idle settings."""

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from tests.dropin.sides import BASE, Side, compare, look, make
from tests.tiny import PadRows, make_dataset, make_model, make_tokenizer

SAVES = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
SIZES = (
    "***** Running training",
    "  Num ",
    "  Instantaneous",
    "  Total ",
    "  Gradient",
    "  Number",
    "  Resuming",
)


@contextmanager
def logged(level: int) -> Iterator[list[str]]:
    """Collect what the HF Trainer's logger is told from a level on."""
    found: list[str] = []
    logger, handler = logging.getLogger("transformers.trainer"), logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_sizes_of_a_run_are_logged_as_natively() -> None:
    def code(side: Side) -> Any:
        with logged(logging.INFO) as found:
            make(side.trainer, arguments=SAVES).train()
            make(side.trainer, arguments=SAVES).train(resume_from_checkpoint="out/checkpoint-3")
        assert sum("Training completed." in line for line in found) == 2
        return [line for line in found if line.startswith(SIZES)]

    lines = compare(code)
    assert len(lines) == 19
    assert lines[-1] == "  Resuming training from checkpoint with epoch 0 and global step 3"


@pytest.mark.parametrize("padding", ["mask", "token", "neither"])
def test_input_tokens_are_counted_and_warned_of_as_natively(padding: str) -> None:
    def code(side: Side) -> Any:
        tokenizer, rows = make_tokenizer(), make_dataset("distilbert", 8)
        if padding != "mask":
            rows = rows.remove_columns("attention_mask")
        if padding == "neither":
            tokenizer.pad_token = None
        trainer = make(
            side.trainer,
            arguments={"include_num_input_tokens_seen": "non_padding", "max_steps": 2},
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=PadRows(),
        )
        with logged(logging.WARNING) as found:
            output = trainer.train()
        return look(trainer, output), found

    facts, warnings = compare(code)
    assert facts["state"]["num_input_tokens_seen"] > 0
    assert bool(warnings) == (padding == "neither")


def test_a_run_resumed_with_another_batch_size() -> None:
    def code(side: Side) -> Any:
        make(side.trainer, arguments=SAVES).train()
        more = {"per_device_train_batch_size": 2, "max_steps": 5, "save_strategy": "no"}
        trainer = make(side.trainer, arguments={**SAVES, **more})
        trainer.train(resume_from_checkpoint="out/checkpoint-3")
        return [trainer._train_batch_size, trainer.state.train_batch_size, trainer.state.global_step]

    assert compare(code) == [2, 4, 5]


def split_weights(folder: Path) -> None:
    """Split the weights of a checkpoint into a shard for each, as the user may."""
    whole = folder / "model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    shards = {name: f"model-{number}.safetensors" for number, name in enumerate(weights)}
    for name, shard in shards.items():
        save_file({name: weights[name]}, folder / shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_checkpoint_whose_weights_the_user_has_split() -> None:
    def code(side: Side) -> Any:
        make(side.trainer, arguments=SAVES).train()
        split_weights(Path("out/checkpoint-3"))
        trainer = make(side.trainer, arguments=SAVES)
        return look(trainer, trainer.train(resume_from_checkpoint="out/checkpoint-3"))

    compare(code)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("names", [["one", "two"], ["default", "two"]])
def test_a_checkpoint_of_several_adapters(names: list[str]) -> None:
    peft = pytest.importorskip("peft")
    rows = {"train_dataset": make_dataset("llama", 30), "eval_dataset": None, "compute_metrics": None}

    def adapted() -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(make_model("llama"), config, names[0])
        model.add_adapter(names[1], config)
        return model

    def code(side: Side) -> Any:
        given = {**rows, "data_collator": PadRows()}
        first = adapted()
        with torch.no_grad():
            for name, parameter in first.named_parameters():
                parameter.mul_(2 if "two" in name else 1)  # which a checkpoint has to bring back
        make(side.trainer, arguments=SAVES, model=first, **given).train()
        trainer = make(side.trainer, arguments=SAVES, model=adapted(), **given)
        trainer.train(resume_from_checkpoint="out/checkpoint-3")
        resumed = trainer.model.state_dict()
        return [
            trainer.state.log_history[-2],
            resumed,
            [torch.equal(first.state_dict()[n], resumed[n]) for n in resumed],
        ]

    assert all(compare(code)[-1])


class Remembering(nn.Module):
    """Keep the order of its samples in a buffer, which its `load_state_dict` makes as long as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)
        self.register_buffer("order", torch.empty(0))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.order = state_dict["order"].clone()
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, x: Any, labels: Any = None) -> Any:
        self.order = torch.cat([self.order, x[:, 0].detach()])
        logits = self.line(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Numbered(Dataset[Any]):
    """Samples whose first feature is their number."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index), 1.0, -1.0]), "labels": index % 2}


def test_a_model_that_loads_its_weights_itself() -> None:
    def code(side: Side) -> Any:
        found = []
        for checkpoint in (None, "out/checkpoint-3"):
            torch.manual_seed(4)
            given = {"train_dataset": Numbered(), "eval_dataset": None, "data_collator": None}
            trainer = make(side.trainer, arguments=SAVES, model=Remembering(), compute_metrics=None, **given)
            trainer.train(resume_from_checkpoint=checkpoint)
            found.append(look(trainer))
        return found

    whole, resumed = compare(code)
    assert torch.equal(whole["weights"]["order"], resumed["weights"]["order"])
    assert len(whole["weights"]["order"]) == 60


class Noisy(nn.Module):
    """Draw from Python's, numpy's and torch's generators; take whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, x: Any, labels: Any = None, **others: Any) -> Any:
        noise = torch.randn(1) + np.random.rand() + random.random()
        logits = self.line(x) * (1 + noise / 20)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_draws_from_all_generators() -> None:
    def code(side: Side) -> Any:
        found = []
        for checkpoint in (None, "out/checkpoint-3"):
            torch.manual_seed(4)
            given = {"train_dataset": Numbered(), "eval_dataset": None, "data_collator": None}
            trainer = make(side.trainer, arguments=SAVES, model=Noisy(), compute_metrics=None, **given)
            found.append(look(trainer, trainer.train(resume_from_checkpoint=checkpoint)))
        return found

    whole, resumed = compare(code)
    assert torch.equal(whole["weights"]["line.bias"], resumed["weights"]["line.bias"])


@pytest.mark.parametrize(
    "unread",
    [
        {"metric_for_best_model": "accuracy", "greater_is_better": True},
        {"greater_is_better": False},
        {"optim_target_modules": [r".*attn.*"]},
        {"length_column_name": "lengths"},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"liger_kernel_config": {"rope": False}},
    ],
    ids=lambda unread: next(iter(unread)),
)
def test_settings_that_nothing_reads_are_ignored(unread: dict[str, Any]) -> None:
    def code(side: Side) -> Any:
        trainer = make(side.trainer, arguments={**SAVES, **unread, "max_steps": 3})
        facts = look(trainer, trainer.train())
        assert {name: getattr(trainer.args, name) for name in unread} == unread
        return facts

    assert compare(code)["state"]["best_model_checkpoint"] is None
    assert BASE.keys().isdisjoint(unread)
