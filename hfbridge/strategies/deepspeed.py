"""DeepSpeed: optimizer, gradients and weights are shared out among the ranks (ZeRO); knows Lightning.

As natively, the engine wraps the Hugging Face model and not the LightningModule, and it takes the optimizer
step inside the backward of a window's last micro-batch. Clipping and step, which Lightning calls afterwards,
find everything done.

    stage    each rank keeps its share of
    1        the optimizer state
    2        that, and the gradients
    3        that, and the weights
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import strategies
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from hfbridge.errors import CheckpointError, SettingsError
from hfbridge.optional import require
from hfbridge.settings.deepspeed import Config, check_config, check_name, preset, read_config, value_in
from hfbridge.settings.settings import Settings
from hfbridge.strategies.launcher import ScriptLauncher, open_group
from hfbridge.strategies.sharing import Sharing

_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")


class DeepSpeedStrategy(strategies.DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with the native Trainer's configuration, on GPUs and on CPUs.

    Args:
        config: DeepSpeed's configuration: a dictionary, the path of a JSON file, or JSON; "auto" is filled
            from the settings. `None` is the one that `stage` and `offload` stand for.
        stage: of ZeRO: 1, 2 or 3; `None` is the configuration's, or 2.
        offload: the optimizer, and with stage 3 the weights, live in the host's memory.
        settings: compared with the configuration at once, before any process or model is there.
        on_cpu: the run uses no GPU; found out if left out.
        timeout: what a collective waits for the other ranks.
        process_group_backend: "gloo" or "nccl".

    Attributes:
        given_config: the configuration, "auto" not yet filled.
        sharing: how the ranks share the model.

    Raises:
        MissingDependencyError: deepspeed is not installed.
        SettingsError: the configuration cannot be read or carried, or the settings say otherwise.

    Mirrors: accelerate.Accelerator._prepare_deepspeed
    Proved by: tests/distributed/test_deepspeed.py
    """

    def __init__(
        self,
        config: Config | str | os.PathLike[str] | None = None,
        *,
        stage: int | None = None,
        offload: bool = False,
        settings: Settings | None = None,
        on_cpu: bool | None = None,
        timeout: timedelta = default_pg_timeout,
        process_group_backend: str | None = None,
    ) -> None:
        self.given_config: dict[str, Any]
        if config is None:
            self.given_config = preset(stage or 2, offload=offload)
        else:
            self.given_config = read_config(config)
        check_config(self.given_config, settings)
        differs = "" if stage is None else check_name(self.given_config, stage=stage, offload=offload)
        if differs:
            raise SettingsError(f"deepspeed: {differs}: set through both; choose one.")
        if on_cpu or (on_cpu is None and not torch.cuda.is_available()):
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        require("deepspeed", extra="deepspeed", for_=f'strategy="deepspeed_stage_{self.stage}"')
        super().__init__(config={}, timeout=timeout, process_group_backend=process_group_backend)
        self._environment_before: dict[str, str | None] | None = None
        self.sharing = EngineSharing(self)
        self._engine_precision = EnginePrecision(self.sharing)

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        stage: int = value_in(self.given_config, "zero_optimization.stage")
        return stage

    @property
    def zero_stage_3(self) -> bool:
        """Whether the weights are shared out, too."""
        return self.stage == 3

    @property
    def precision_plugin(self) -> Precision:
        """What runs a backward: the engine; dtypes are its own business."""
        return self._engine_precision if hasattr(self, "_engine_precision") else Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Lightning's own plugin for DeepSpeed would step a second time."""

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning's batches are whole windows."""
        return False

    # Processes.

    def _configure_launcher(self) -> None:
        """Start the ranks of a script that no launcher has started."""
        assert self.cluster_environment is not None
        self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Open the process group; Lightning's own refuses CPUs."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Open the process group, and tell DeepSpeed and the environment of it.

        Raises:
            SettingsError: deepspeed has been imported for another kind of device.
        """
        deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
        kind = deepspeed.get_accelerator().device_name()
        if kind != self.root_device.type:
            raise SettingsError(
                f"deepspeed was imported for {kind}, and the run is on {self.root_device.type}. Set the "
                f"environment variable DS_ACCELERATOR={self.root_device.type} before deepspeed is imported."
            )
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        if self._environment_before is None:
            self._environment_before = {name: os.environ.get(name) for name in _VARIABLES}
        self._set_node_environment_variables()
        self._process_group_backend = backend = self._get_process_group_backend()
        open_group(self.cluster_environment, backend, timeout=self._timeout, device=self.root_device)
        deepspeed.init_distributed(
            backend,
            verbose=False,
            distributed_port=self.cluster_environment.main_port,
            timeout=self._timeout or default_pg_timeout,
        )

    # Model and optimizer.

    def model_sharded_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Do nothing: transformers builds in parts by itself."""
        return nullcontext()

    def tensor_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[None]:  # type: ignore[override]
        """Likewise."""
        return nullcontext()

    def setup(self, trainer: pl.Trainer) -> None:
        """Have the module make its optimizer, and with it the engine."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            Strategy.setup_optimizers(self, trainer)
            folder, self.sharing.parts_to_load = self.sharing.parts_to_load, None
            if folder is not None:
                self.sharing.load_parts(folder)
        module: Any = self.lightning_module
        if self.sharing.engine is None:
            self.model_to_device()
        else:
            self.model = self.sharing.engine
            if self.root_device.type != "cpu":
                module.to(self.root_device)
        self.barrier()

    # Checkpoints.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Read before there is an engine, so that the run knows from its start where it goes on."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The engine has read the optimizer's state with the weights."""
        return False

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take whole weights to evaluate with; to train, the engine reads what each rank holds."""
        module: Any = self.lightning_module
        if self.sharing.parts_to_load is not None and module.trainer.state.fn == TrainerFn.FITTING:
            return
        weights = checkpoint["state_dict"].items()
        prefix = "model."
        self.sharing.load_weights(
            module.model, {n.removeprefix(prefix): t for n, t in weights if n.startswith(prefix)}
        )

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Refuse: one file cannot hold what an engine reads.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            "Under DeepSpeed a run goes on from directories, which save_strategy in the settings writes; "
            "trainer.save_checkpoint and ModelCheckpoint write single files. Leave them out. For the weights "
            "alone call module.save_pretrained(folder)."
        )

    def teardown(self) -> None:
        """Leave model and engine where they are, as natively: all ranks still need a sharded model."""
        self.model = self.lightning_module
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            assert part is not None
            part.teardown()
        for name, value in (self._environment_before or {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment_before = None

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        """Call the module's step, in which each micro-batch's forward goes through the engine."""
        assert self.lightning_module is not None
        return self.lightning_module.training_step(*arguments, **named)

    def validation_step(self, *arguments: Any, **named: Any) -> Any:
        """Call the module's step with the model as it is, as natively."""
        assert self.lightning_module is not None
        return self.lightning_module.validation_step(*arguments, **named)

    def predict_step(self, *arguments: Any, **named: Any) -> Any:
        """Likewise."""
        assert self.lightning_module is not None
        return self.lightning_module.predict_step(*arguments, **named)


class EngineSharing(Sharing):
    """How ranks share a model under DeepSpeed.

    Attributes:
        engine: DeepSpeed's engine; `None` until a run has made one.
    """

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        super().__init__(strategy)
        self.engine: Any = None
        self._is_last = True
        self._has_begun = False
        self._told = strategy
        self.is_sharded = strategy.zero_stage_3
        self.zero_config = strategy.given_config
        self.save_parts = self._save_parts

    def autocasts(self, *, trains: bool) -> bool:
        """Whether bf16 is for autocast to do; an engine casts the weights."""
        return not trains and not self.is_sharded

    def train(
        self,
        model: nn.Module,
        config: dict[str, Any],
        optimizer: Optimizer | None,
        schedule: Callable[[Any], Any] | None,
    ) -> tuple[Optimizer, Any]:
        """Make an engine that trains.

        Args:
            model: the Hugging Face model.
            config: completed.
            optimizer: `None` has the engine make the one its configuration names.
            schedule: makes a schedule for the optimizer that the engine makes; the engine steps it.

        Returns:
            What stands for the engine's optimizer, and the schedule that the engine steps, if it has one.
        """
        parameters = None if optimizer is not None else [p for p in model.parameters() if p.requires_grad]
        engine = self._make(
            model, config, optimizer=optimizer, model_parameters=parameters, lr_scheduler=schedule
        )
        return EngineOptimizer(engine.optimizer), engine.lr_scheduler

    def serve(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Make an engine that evaluates, where each rank has a part of the weights only and none is there."""
        if self.is_sharded and (self.engine is None or self.engine.module is not model):
            self._make(model, config)

    def forward_through(self, model: nn.Module) -> Any:
        """Return the engine."""
        return self.engine if self.engine is not None and self.engine.module is model else model

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Note whether this micro-batch is the window's last."""
        self._is_last = is_last
        if not self._has_begun:
            self._has_begun = True
            self._forget_order()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run a micro-batch's backward, and with the window's last one the optimizer step.

        Mirrors: accelerate.utils.deepspeed.DeepSpeedEngineWrapper.backward
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=self._is_last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if self._is_last:
            self.engine.step()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """Return the norm by which the engine has clipped, scalar; `None` if it has not looked.

        Mirrors: accelerate.Accelerator.clip_grad_norm_
        """
        norm = self.engine.get_global_grad_norm()
        return norm if norm is None or isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Hold all weights on each rank for a while, where forwards find them; all ranks enter and leave."""
        if not is_in_parts(model):
            yield
            return
        deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
        offload = self._offload if self.engine is not None and self.engine.module is model else None
        if offload is not None:
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                yield
        finally:
            if offload is not None:
                offload.setup_zero_stage3_hooks()

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the whole `state_dict` of the model on the first rank, layer by layer.

        Mirrors: accelerate.Accelerator.get_state_dict
        """
        if not is_in_parts(model):
            return _copied(model.state_dict()) if self._told.local_rank == 0 else None
        found: Mapping[str, Tensor] | None = self.engine._zero3_consolidated_16bit_state_dict()
        return found

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put whole weights, which every rank has read, into the model."""
        if is_in_parts(model):
            deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
            with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
                if self._strategy.is_global_zero:
                    model.load_state_dict(weights)
            for name, buffer in model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        else:
            model.load_state_dict(weights)

    @property
    def keeps_schedule(self) -> bool:  # type: ignore[override]
        """Whether the engine steps the schedule, and keeps its state."""
        return self.engine is not None and self.engine.lr_scheduler is not None

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return nothing: it is in the parts."""
        return None

    def load_parts(self, folder: str) -> None:
        """Have the engine read weights, optimizer and its schedule.

        Raises:
            CheckpointError: other ranks wrote it than there are, or it is not whole.

        Mirrors: transformers.integrations.deepspeed.deepspeed_load_checkpoint
        """
        latest = Path(folder, "latest")
        tag = latest.read_text().strip() if latest.exists() else ""
        wrote = len(list(Path(folder, tag).glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))) if tag else 0
        if wrote != self._told.world_size:
            raise CheckpointError(
                f"{folder!r} holds the optimizer's parts of {wrote} ranks, and this run has "
                f"{self._told.world_size}. Resume with {wrote}, or begin a new run with its weights."
            )
        path, _ = self.engine.load_checkpoint(folder, load_module_strict=not _has_adapter(self.engine.module))
        if path is None:
            raise CheckpointError(f"DeepSpeed could not read {folder!r}; its messages say why.")

    def _save_parts(self, folder: Path) -> None:
        """Have the engine write what each rank holds.

        Mirrors: transformers.Trainer._save_optimizer_and_scheduler
        """
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=_has_adapter(self.engine.module))

    @property
    def _offload(self) -> Any:
        """The part of an engine of stage 3 whose hooks fetch weights."""
        return getattr(self.engine.optimizer, "parameter_offload", self.engine.optimizer)

    def _forget_order(self) -> None:
        """Have stage 3 learn anew in which order weights are wanted; what was tried before was not it."""
        if self.is_sharded:
            coordinator = self._offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def _make(self, model: nn.Module, config: dict[str, Any], **parts: Any) -> Any:
        """Make an engine; one that an earlier run has left gives way."""
        self._end()
        deepspeed = require("deepspeed", extra="deepspeed", for_='strategy="deepspeed"')
        self._has_begun = False
        index = self._strategy.root_device.index
        self.engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=-1 if index is None else index),
            model=model,
            config_params=config,
            dist_init_required=False,
            **parts,
        )
        return self.engine

    def _end(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None


class EnginePrecision(Precision):
    """Have the engine run a backward, between Lightning's hooks; it scales what is to be scaled.

    Args:
        sharing: knows the engine.
    """

    def __init__(self, sharing: EngineSharing) -> None:
        self._sharing = sharing

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the backward of one micro-batch."""
        self._sharing.backward(tensor)


class EngineOptimizer(Optimizer):
    """What stands for an engine's optimizer in a loop: the engine itself has stepped when `step` is called.

    Args:
        optimizer: of the engine, around the one that was given to it.

    Mirrors: accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.__setstate__({})  # hooks, without any groups of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the engine's optimizer."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of this rank's share."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the optimizer that the engine was given."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        defaults: dict[str, Any] = inner.defaults
        return defaults

    def step(self, closure: Any = None) -> Any:
        """Run the closure, in which the engine steps."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine has cleared the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's state of this rank's share."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state


def _has_adapter(model: nn.Module) -> bool:
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy weights out of the engine's flat buffers; what is tied stays tied."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}


def is_in_parts(model: nn.Module) -> bool:
    """Whether each rank holds a part of a model's weights only, by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
