"""DeepSpeed: optimizer, gradients and weights are shared out among the ranks (ZeRO).

As in the HF Trainer, the engine wraps the Hugging Face model and not the LightningModule, and it takes the
optimizer step inside the backward of its last micro-batch. Clipping and step, which Lightning calls
afterwards, find everything done.

    stage    each rank keeps its share of
    1        the optimizer state
    2        that, and the gradients
    3        that, and the weights
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout

from hfbridge.errors import CheckpointError, SettingsError
from hfbridge.settings.deepspeed_config import (
    Config,
    check_config,
    check_name,
    preset,
    read_config,
    value_in,
    without_automatic,
)
from hfbridge.settings.settings import Settings
from hfbridge.strategies.builds import warn_of_old_locks
from hfbridge.strategies.deepspeed_engine import EnginePrecision, EngineSharing, UndividedPrecision
from hfbridge.strategies.launcher import ScriptLauncher, open_group
from hfbridge.strategies.sharing import DirectSteps, for_hfmodule, is_shared_module
from hfbridge.utilities.imports import require

_SINGLE_FILES = (
    "Under DeepSpeed a run resumes from directories, which save_strategy in the settings writes; "
    "trainer.save_checkpoint and ModelCheckpoint write single files. Leave them out (a plain "
    "lightning.Trainer has a ModelCheckpoint unless enable_checkpointing=False). For the weights alone call "
    "module.save_pretrained(folder)."
)
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")


@for_hfmodule(
    "handles_gradient_accumulation",
    "block_backward_sync",
    "model_sharded_context",
    "tensor_init_context",
    "setup",
    "restore_checkpoint_after_setup",
    "lightning_restore_optimizer",
    "load_checkpoint",
    "load_model_state_dict",
    "save_checkpoint",
)
class DeepSpeedStrategy(DirectSteps, strategies.DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with the HF Trainer's configuration, on GPUs and on CPUs.

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
        SettingsError: the configuration cannot be read or is not supported, or the settings say otherwise.

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
            raise SettingsError(f"deepspeed: {differs}; set only one.")
        if on_cpu or (on_cpu is None and not torch.cuda.is_available()):
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        require("deepspeed", extra="deepspeed", for_=f'strategy="deepspeed_stage_{self.stage}"')
        super().__init__(config={}, timeout=timeout, process_group_backend=process_group_backend)
        self._other_precision = UndividedPrecision("32-true")
        self._environment_before: dict[str, str | None] | None = None
        self.sharing = EngineSharing(self, config=self.given_config, is_sharded=self.zero_stage_3)
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
        """Runs a backward by the engine; of an HFModule it has the dtypes, too."""
        if not hasattr(self, "_engine_precision"):
            return Precision()
        if self.lightning_module is None or is_shared_module(self.lightning_module):
            return self._engine_precision
        return self._other_precision

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Take the precision of other modules; with an HFModule its plugin would step a second time."""
        if precision_plugin is not None:
            self._other_precision = UndividedPrecision(precision_plugin.precision)  # type: ignore[arg-type]

    @property
    def root_device(self) -> torch.device:
        """This rank's device; Lightning passes its number to DeepSpeed."""
        device, module = super().root_device, self.lightning_module
        is_other = module is not None and not is_shared_module(module)
        return torch.device("cpu", 0) if is_other and device.type == "cpu" else device

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning's loop decides when to step, and `block_backward_sync` keeps the engine from it."""
        return False

    def block_backward_sync(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Have the engine add gradients up, and not step."""
        return self.sharing.no_sync()

    # Processes.

    def _configure_launcher(self) -> None:
        """Start the ranks of a script that no launcher has started."""
        assert self.cluster_environment is not None
        self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Open the process group; Lightning's own refuses CPUs."""
        if not is_shared_module(self.lightning_module):
            self.config = without_automatic(self.given_config)
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Open the process group, and make it known to DeepSpeed and the environment.

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
        if self.local_rank == 0:
            warn_of_old_locks()
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
        """Do nothing: transformers builds in parts by itself."""
        return nullcontext()

    def setup(self, trainer: pl.Trainer) -> None:
        """Have the module make its optimizer, and with it the engine.

        Raises:
            CheckpointError: a callback would have to write files that no engine reads.
        """
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            _check_callbacks(trainer)
            Strategy.setup_optimizers(self, trainer)
            folder = self.sharing.parts_to_load
            self.sharing.resume_from(None)
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
        """Read the checkpoint before there is an engine: position and state are needed from the start."""
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
        raise CheckpointError(_SINGLE_FILES)

    def teardown(self) -> None:
        """Leave model and engine where they are: all ranks still need a sharded model."""
        if is_shared_module(self.lightning_module):
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


def _check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse before training what would be refused at its first save."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (callback.save_top_k != 0 or callback.save_last):
            raise CheckpointError(_SINGLE_FILES)
