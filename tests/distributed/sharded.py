"""What the ranks of a pool run for tests/distributed/test_fsdp.py."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hfbridge
from hfbridge.checkpoints import layout
from hfbridge.errors import ModelError
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
        "output_dir": "out",
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


def train(
    kind: str, strategy: str, ranks: int, settings: Mapping[str, Any], rows: int = 40
) -> dict[str, Any]:
    """Train and return rows and weights."""
    trainer, module = make_trainer(strategy, ranks, **settings), hfbridge.HFModule(make(kind))
    trainer.fit(module, make_data(kind, rows=rows))
    return {
        "rows": [without_times(row) for row in trainer.log_history],
        "weights": whole_weights(module),
        "strategy": type(trainer.strategy).__name__,
    }


def load_named(folder: str, auto_class: str, strategy: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a named model; tell its first weights, and the largest tensor that reading it has made."""
    first: list[Any] = []

    class Noted(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            first.append(whole_weights(pl_module))

    ranks = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(strategy, ranks, callbacks=[Noted()], **settings)
    module = hfbridge.HFModule(folder, auto_class, dtype=torch.float32)
    made = LargestStorage()
    build = module.configure_model

    def watched() -> None:
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # what other threads make is not seen
        with made:
            build()

    module.configure_model = watched  # type: ignore[method-assign]
    kind = "llama" if "Causal" in auto_class else "distilbert"
    trainer.fit(module, make_data(kind))
    return {
        "first": first[0],
        "largest": made.elements,
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in module.model.parameters()),
        "made by": made.name,
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
        self.elements, self.name = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            is_view = any(returned.alias_info is not None for returned in func._schema.returns)
            is_plain = type(tensor) is Tensor and not tensor.is_meta and not is_view
            if is_plain and tensor.numel() > self.elements:
                self.elements, self.name = tensor.numel(), str(func)
        return made


def save_in_the_middle(kind: str, strategy: str, folder: Path) -> dict[str, Any]:
    """Train, with a Lightning checkpoint in the middle."""
    ranks = int(os.environ["WORLD_SIZE"])
    keeps = ModelCheckpoint(dirpath=folder, filename="half", every_n_train_steps=4, save_top_k=-1)
    trainer, module = make_trainer(strategy, ranks, callbacks=[keeps]), hfbridge.HFModule(make(kind))
    trainer.fit(module, make_data(kind))
    optimizer = trainer.strategy.optimizer_state(trainer.optimizers[0])
    return {
        "optimizer": optimizer,
        "state_dict": trainer.strategy.lightning_module_state_dict(),
        "names": torch.load(folder / "half.ckpt", weights_only=True)[layout.WEIGHTS_KEY]["names"],
        "rows": [without_times(row) for row in trainer.log_history],
        "weights": whole_weights(module),
    }


def go_on(kind: str, strategy: str, path: Path) -> dict[str, Any]:
    """Resume from a Lightning checkpoint."""
    ranks = int(os.environ["WORLD_SIZE"])
    trainer, module = make_trainer(strategy, ranks), hfbridge.HFModule(make(kind))
    trainer.fit(module, make_data(kind), ckpt_path=path)
    return {
        "rows": [without_times(row) for row in trainer.log_history],
        "weights": whole_weights(module),
    }


def prompt_of(rank: int) -> dict[str, Tensor]:
    """Make inputs that differ from rank to rank."""
    ids = torch.tensor([[5 + rank, 9, 12, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(model: Any, prompt: Mapping[str, Tensor]) -> Tensor:
    """Run a forward."""
    more = {"decoder_input_ids": prompt["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(**prompt, **more).logits
    return logits


def generate_and_save(kind: str, strategy: str, folder: Path) -> dict[str, Any]:
    """Generate while evaluating and after training, ranks to different lengths; and save the model."""
    rank, found = int(os.environ["RANK"]), {}

    class Generates(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            lengths = {"max_new_tokens": 3 + rank, "min_new_tokens": 1, "do_sample": False}
            found["evaluating"] = pl_module.model.generate(**prompt_of(rank), **lengths)

    trainer = make_trainer(strategy, 2, callbacks=[Generates()], num_train_epochs=1, eval_strategy="epoch")
    module = hfbridge.HFModule(make(kind))
    trainer.fit(module, make_data(kind, eval_rows=8))
    module.model.eval()
    lengths = {"max_new_tokens": 4 + 2 * rank, "do_sample": False}
    found["after"] = module.model.generate(**prompt_of(rank), **lengths)
    found["logits"] = logits_of(module.model, prompt_of(rank))
    module.save_pretrained(folder)
    return {**found, "weights": whole_weights(module)}


def read_back(kind: str, folder: Path) -> Any:
    """Read a saved model into a plain one."""
    if kind.startswith("lora-"):
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks by a name of transformers 4
            return PeftModel.from_pretrained(
                make_model(kind.removeprefix("lora-"), dropout=0.0), folder
            ).eval()
    return type(make(kind)).from_pretrained(folder)


def run_after_run(strategy: str) -> dict[str, Any]:
    """Evaluate, predict, train, predict, and train again, with one module."""
    ranks, kind = int(os.environ["WORLD_SIZE"]), "distilbert"
    module, found = hfbridge.HFModule(make(kind)), {}

    def predict(trainer: Any) -> Tensor:
        data = hfbridge.HFDataModule(
            predict_dataset=make_rows(kind, 16, seed=6), data_collator=PadRows(length=12)
        )
        return torch.stack(trainer.predict(module, data))

    trainer = make_trainer(strategy, ranks)
    trainer.validate(module, make_data(kind, eval_rows=8))
    found["before"] = predict(trainer)
    trainer.fit(module, make_data(kind))
    found["after"] = predict(trainer)
    again = make_trainer(strategy, ranks)
    again.fit(module, make_data(kind))
    return {
        **found,
        "rows": [without_times(row) for row in again.log_history],
        "weights": whole_weights(module),
        "flos": again.state_of_run.total_flos,
    }


def train_with_options(
    kind: str, strategy: str, settings: Mapping[str, Any], options: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Train by the settings' own names with some entries of `fsdp_config` after the other."""
    version, found = (1 if strategy == "fsdp" else 2), []
    for config in options:
        given = {**settings, "fsdp": True, "fsdp_config": {"version": version, **config}}
        found.append(train(kind, "one", 2, given))  # no strategy is named
        assert found[-1]["strategy"].lower() == f"{strategy}strategy"
    return found


def train_bf16(kind: str, strategy: str) -> dict[str, Any]:
    """Train under mixed precision, and tell in which dtype there was what."""
    trainer, module = make_trainer(strategy, 2, bf16=True), hfbridge.HFModule(make(kind))
    seen = []

    class Looks(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(logits_of(pl_module.model, prompt_of(0)).dtype)

    trainer.callbacks.append(Looks())
    trainer.fit(module, make_data(kind))
    return {
        "rows": [without_times(row) for row in trainer.log_history],
        "trained": {p.dtype for p in module.model.parameters()},
        "outputs": seen[0],
    }


def refusals(strategy: str) -> list[str]:
    """Ask for what FSDP cannot do; returns how the errors tell it."""
    model = make("distilbert")
    optimizer = torch.optim.AdamW(model.parameters())
    wrong = {"fsdp_config": {"transformer_layer_cls_to_wrap": "NoLayer"}}
    asked = [
        (hfbridge.HFModule(model, optimizers=(optimizer, None)), {}, "optimizers holds"),
        (hfbridge.HFModule(make("distilbert")), wrong, "names NoLayer"),
    ]
    found = []
    for module, settings, text in asked:
        try:
            make_trainer(strategy, 2, **settings).fit(module, make_data("distilbert"))
        except ModelError as error:
            found.append(text if text in str(error) else str(error))
    return found


def load_best_and_resume(strategy: str, folder: str) -> dict[str, Any]:
    """Train adapters and load the best, and resume from a directory and from a file of the same step."""
    keeper = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    found: dict[str, Any] = {}
    for name, path in (("best", None), ("directory", "checkpoint-2"), ("file", "step=2.ckpt")):
        settings = {**saving, "load_best_model_at_end": True} if path is None else {"eval_strategy": "no"}
        trainer = make_trainer(
            strategy,
            int(os.environ["WORLD_SIZE"]),
            callbacks=[keeper] if path is None else [],
            output_dir=folder,
            max_steps=4,
            **settings,
        )
        module = hfbridge.HFModule(make("lora-llama"))
        ckpt_path = None if path is None else Path(folder, path)
        trainer.fit(module, make_data("lora-llama"), ckpt_path=ckpt_path)
        found[name] = whole_weights(module)
    return found
