"""What FSDP and FSDP2 have in common as strategies of Lightning's.

The Hugging Face model is sharded by HFModule.configure_model, through `Sharing.shard`, and nothing else is:
steps are called directly, and each micro-batch's forward goes through the sharded model. States are gathered
to the first rank in the form that they have on a single device, so that any strategy resumes from them.

    Lightning calls                    answered by
    lightning_module_state_dict        Sharing.weights
    load_model_state_dict              Sharing.load_weights
    optimizer_state                    Sharing.optimizer_state
    load_optimizer_state_dict          Sharing.load_optimizer_state
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from hfbridge.errors import SettingsError
from hfbridge.strategies.launcher import ScriptLauncher, open_group
from hfbridge.strategies.sharing import DirectSteps, Sharing, for_hfmodule, is_shared_module

_MODEL = "model."


@for_hfmodule(
    "restore_checkpoint_after_setup",
    "lightning_restore_optimizer",
    "setup",
    "model_to_device",
    "block_backward_sync",
    "lightning_module_state_dict",
    "load_model_state_dict",
    "optimizer_state",
    "load_optimizer_state_dict",
    "save_checkpoint",
    "load_checkpoint",
)
class ShardedStrategy(DirectSteps, ParallelStrategy):
    """A strategy whose ranks hold parts of the Hugging Face model: what both versions of FSDP have in common.

    Attributes:
        sharing: how the ranks share the model.

    Proved by: tests/distributed/test_fsdp.py
    """

    sharing: Sharing
    num_nodes: int
    num_processes: int

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The model is sharded already when a checkpoint is restored."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Checkpoints are read by all ranks, and Lightning hands their states back."""
        return True

    @property
    def precision_plugin(self) -> Precision:
        """One that does nothing: casting is a part of the sharding."""
        return Precision() if self._precision_plugin is None else self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        is_plain = isinstance(precision_plugin, FSDPPrecision) and precision_plugin.precision == "32-true"
        self._precision_plugin = None if is_plain else precision_plugin

    def _configure_launcher(self) -> None:
        """Start the ranks of a script that no launcher has started."""
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Open the process group; a restarted attempt has one of its own.

        Raises:
            SettingsError: `sync_batchnorm` is set with an HFModule.
        """
        if self._layer_sync is not None and is_shared_module(self.lightning_module):
            raise SettingsError(
                "Trainer(sync_batchnorm=True) replaces layers of the model, which FSDP has sharded by then. "
                'Leave it out, or use strategy="ddp".'
            )
        strategy: Any = self
        strategy.set_world_ranks()
        assert self.cluster_environment is not None
        backend = strategy._get_process_group_backend()
        open_group(self.cluster_environment, backend, timeout=strategy._timeout, device=self.root_device)
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Make the optimizer of the model, which is sharded by now."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Move what the module has beside the model, which is on the ranks' devices by its sharding."""
        module: Any = self.lightning_module
        for name, child in module.named_children():
            if name != "model":
                child.to(self.root_device)
        _move_torchmetrics_to_device(module, self.root_device)
        _update_properties(module, device=self.root_device)

    def block_backward_sync(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Add gradients up on each rank, and do not exchange them."""
        return self.sharing.no_sync()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the weights to the first rank; empty on the others."""
        module: Any = self.lightning_module
        weights = self.sharing.weights(module.model)
        if weights is None:
            return {}
        found = {f"{_MODEL}{name}": tensor for name, tensor in weights.items()}
        for name, child in module.named_children():
            if name != "model":
                found |= child.state_dict(prefix=f"{name}.")
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take from whole weights what this rank holds."""
        module: Any = self.lightning_module
        found = checkpoint["state_dict"]
        weights = {name.removeprefix(_MODEL): t for name, t in found.items() if name.startswith(_MODEL)}
        self.sharing.load_weights(module.model, weights)
        for name, child in module.named_children():
            if name != "model":
                prefix = f"{name}."
                own = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
                child.load_state_dict(own, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the optimizer's state to the first rank; empty on the others."""
        module: Any = self.lightning_module
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self.sharing.optimizer_state(module.model, plain) or {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take from whole states what this rank holds."""
        module: Any = self.lightning_module
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self.sharing.load_optimizer_state(module.model, optimizer, state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, on the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
