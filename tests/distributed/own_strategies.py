"""Lightning's own sharding strategies with an HFModule on two ranks; on CPUs where Lightning wants GPUs."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import fsdp as lightnings_fsdp
from safetensors.torch import load_file
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification

import hfbridge
from tests.lightning.plain_data import SETTINGS, PlainModule, make_loader, make_module, make_trainer
from tests.tiny import PadRows, make_dataset

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
ON_GPU = torch.cuda.device_count() >= RANKS


def _whole_on_cpu(module: Any, world_size: int, rank0_only: bool = True) -> Any:
    """Gather without moving to the CPU what is there, which would free it."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


class FSDPOnCPU(strategies.FSDPStrategy):
    """Lightning's, which asks for a GPU: its class is looked at, and the number of its device."""

    def __init__(self) -> None:
        super().__init__()
        lightnings_fsdp._get_full_state_dict_context = _whole_on_cpu

    def _setup_model(self, model: Any) -> Any:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
        )


class DeepSpeedOnCPU(strategies.DeepSpeedStrategy):
    """Lightning's, which asks for GPUs with numbers of their own."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class CutsItself(hfbridge.HFModule):
    """Shards as Lightning's documentation shows for ModelParallelStrategy."""

    def configure_model(self) -> None:
        super().configure_model()
        if not any(hasattr(module, "unshard") for module in self.model.modules()):
            for layer in self.model.distilbert.transformer.layer:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def make_strategy(name: str) -> Any:
    """Make a strategy by its name."""
    if name == "fsdp":
        return strategies.FSDPStrategy() if ON_GPU else FSDPOnCPU()
    if name.startswith("deepspeed"):
        if not ON_GPU:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return (strategies.DeepSpeedStrategy if ON_GPU else DeepSpeedOnCPU)(stage=int(name[-1]))
    if name == "ddp":
        return hfbridge.strategies.DDPStrategy()
    if name == "tensor parallel":
        return strategies.ModelParallelStrategy()
    return strategies.ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)


def of_ranks(side: str, **more: Any) -> dict[str, Any]:
    """Say for a plain Trainer what settings, or torchrun, say for hfbridge's; `more` of its arguments."""
    if side == "hfbridge":
        return {}
    return {"accelerator": "gpu" if ON_GPU else "cpu", "devices": RANKS, **more}


def train(
    name: str,
    side: str,
    *,
    folder: str,
    settings: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    keeps: bool = False,
    accumulation: int = 1,
    model: str | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Train six optimizer steps, two epochs, and validate.

    Args:
        name: of the strategy; "mesh by hand" is a subclass that shards by itself.
        side: "hfbridge" or "lightning": whose Trainer.
        folder: for all that is written.
        settings: beside those of tests/lightning.
        ckpt_path: to be resumed from.
        keeps: Lightning's ModelCheckpoint keeps every second step.
        accumulation: micro-batches of a step.
        model: folder of a model that is built when the run begins.

    Returns:
        The weights, which `save_pretrained` has written, and the last validation loss.
    """
    said = {
        **SETTINGS,
        **(settings or {}),
        "output_dir": folder,
        "use_cpu": not ON_GPU,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
    }
    said |= {"gradient_accumulation_steps": accumulation, "eval_strategy": "epoch"}
    given: dict[str, Any] = {}
    if model is not None:
        given |= {"model": model, "auto_class": AutoModelForSequenceClassification}
    make_class = (lambda base: CutsItself) if name == "mesh by hand" else (lambda base: base)
    module = make_module(side, make_class, settings=said, **given)
    keeper = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    arguments: dict[str, Any] = {"strategy": make_strategy(name), "callbacks": [keeper] * keeps}
    trainer = make_trainer(side, settings=said, **arguments, **of_ranks(side))
    data = hfbridge.HFDataModule(
        train_dataset=make_dataset("distilbert", 12 * accumulation),
        eval_dataset=make_dataset("distilbert", 8, seed=4),
        data_collator=PadRows(),
        settings=said if side == "lightning" else None,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    loss = float(trainer.callback_metrics["eval_loss"])
    module.save_pretrained(Path(folder, "saved"))
    if name != "fsdp":  # Lightning wraps again what it has wrapped, which no module survives
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
        assert abs(metrics["eval_loss"] - loss) < 1e-6
    return load_file(Path(folder, "saved", "model.safetensors")), loss


class WithMomentum(PlainModule):
    """A LightningModule whose optimizer has a state: Lightning cannot read an empty one."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class PlainCutsItself(WithMomentum):
    """A LightningModule that shards as Lightning's documentation shows."""

    def configure_model(self) -> None:
        if not any(hasattr(module, "unshard") for module in self.model.modules()):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


OURS: dict[str, Any] = {
    "ddp": hfbridge.strategies.DDPStrategy,
    "fsdp": hfbridge.strategies.FSDPStrategy,
    "fsdp2": hfbridge.strategies.FSDP2Strategy,
    **{
        f"deepspeed {stage}": partial(hfbridge.strategies.DeepSpeedStrategy, stage=stage, on_cpu=not ON_GPU)
        for stage in (1, 2, 3)
    },
}


def train_plain(name: str, side: str, folder: str, accumulation: int) -> dict[str, torch.Tensor]:
    """Train and validate a LightningModule that is no HFModule by a strategy of hfbridge's, two epochs.

    The second is resumed from a checkpoint of the first. Returns the weights.
    """
    for epochs in (1, 2):
        module = PlainCutsItself() if name == "fsdp2" else WithMomentum()
        said = {**SETTINGS, "output_dir": folder, "use_cpu": not ON_GPU, "num_train_epochs": epochs}
        said |= {"gradient_accumulation_steps": accumulation, "eval_strategy": "epoch", "max_grad_norm": 0.1}
        keeper = ModelCheckpoint(folder, filename=f"{epochs}", every_n_epochs=1)
        arguments: dict[str, Any] = {"strategy": OURS[name](), "callbacks": [keeper]}
        clipped = of_ranks(side, gradient_clip_val=0.1)
        trainer = make_trainer(side, settings=said, epochs=epochs, **arguments, **clipped)
        rows = make_loader(12 * accumulation, batch_size=2)
        resumed = str(Path(folder, "1.ckpt")) if epochs == 2 else None
        trainer.fit(module, rows, make_loader(8, seed=4, batch_size=2), ckpt_path=resumed)
    parameters = list(module.parameters())
    if hasattr(parameters[0], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    state = module.state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
