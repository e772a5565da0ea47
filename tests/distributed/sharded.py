"""What the ranks of a pool run for tests/distributed/test_fsdp.py."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hfbridge
from tests.parity.engines import without_times
from tests.tiny import PadRows, make_model, make_rows

BASE: Mapping[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
GLOBAL_MICRO_BATCHES = 4  # of a window, on all ranks together; the 40 rows end in a window of 2


def make(kind: str) -> nn.Module:
    """Build a model of tests/tiny.py; "lora-..." is a PEFT model on top of it."""
    if not kind.startswith("lora-"):
        return make_model(kind, dropout=0.0)
    from peft import LoraConfig, get_peft_model

    base = make_model(kind.removeprefix("lora-"), dropout=0.0)
    torch.manual_seed(11)
    made: nn.Module = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    return made


def settings_of(ranks: int, **settings: Any) -> dict[str, Any]:
    """Return settings of the same global batch on any number of ranks."""
    return {
        **BASE,
        "output_dir": tempfile.mkdtemp(),
        "gradient_accumulation_steps": max(GLOBAL_MICRO_BATCHES // ranks, 1),
        **settings,
    }


def make_trainer(strategy: str, ranks: int, *, callbacks: Any = (), **settings: Any) -> hfbridge.Trainer:
    """Make a Trainer of a strategy; "one" is a single process."""
    named = {} if strategy == "one" else {"strategy": strategy}
    return hfbridge.Trainer(
        settings_of(ranks, **settings),
        callbacks=list(callbacks),
        logger=False,
        enable_model_summary=False,
        **named,
    )


def make_data(kind: str, *, rows: int = 40, eval_rows: int = 11) -> hfbridge.HFDataModule:
    """Make the data of a kind of model."""
    kind = {"bert-mlm": "bert-token"}.get(kind, kind.removeprefix("lora-"))
    return hfbridge.HFDataModule(
        train_dataset=make_rows(kind, rows),
        eval_dataset=make_rows(kind, eval_rows, seed=5),
        data_collator=PadRows(),
    )


def whole_weights(module: hfbridge.HFModule) -> dict[str, Tensor] | None:
    """Gather the weights of a module; `None` on all ranks but the first."""
    found = module.sharing.weights(module.model)
    return None if found is None else {name: tensor.detach().clone() for name, tensor in found.items()}


def train(kind: str, strategy: str, ranks: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and return rows and weights."""
    trainer, module = make_trainer(strategy, ranks, **settings), hfbridge.HFModule(make(kind))
    trainer.fit(module, make_data(kind))
    return {
        "rows": [without_times(row) for row in trainer.log_history],
        "weights": whole_weights(module),
        "strategy": type(trainer.strategy).__name__,
    }


def place(name: str) -> Path:
    """Return a path in the directory of the job, the same for all ranks."""
    return Path.cwd().parent / name


def load_named(folder: str, auto_class: str, strategy: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a named model; tell its first weights, and the largest tensor that building it has made."""
    first: list[Any] = []

    class Noted(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            first.append(whole_weights(pl_module))

    ranks = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(strategy, ranks, callbacks=[Noted()], **settings)
    module = hfbridge.HFModule(folder, auto_class)
    made = LargestStorage()
    build = module.configure_model

    def watched() -> None:
        with made:
            build()

    module.configure_model = watched  # type: ignore[method-assign]
    kind = "llama" if "Causal" in auto_class else "distilbert"
    trainer.fit(module, make_data(kind))
    return {
        "first": first[0],
        "largest": made.elements,
        "rows": [without_times(row) for row in trainer.log_history],
        "weights": whole_weights(module),
        "config": module.model.config.to_dict(),
        "tied": tied_names(module.model),
    }


def tied_names(model: nn.Module) -> set[str]:
    """Name the parameters that another one is."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for of_one in names.values() if len(of_one) > 1 for name in of_one}


class LargestStorage(TorchDispatchMode):
    """Watch for the largest tensor with data that is made; views of others, as of mapped files, are not."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and type(tensor) is Tensor and tensor.device.type != "meta":
                self.elements = max(self.elements, tensor.numel())
        return made
