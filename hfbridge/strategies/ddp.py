"""DDP around the Hugging Face model instead of the LightningModule, as in the HF Trainer."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import strategies
from torch import nn
from torch.distributed.constants import default_pg_timeout

from hfbridge.strategies.launcher import ScriptLauncher, open_group
from hfbridge.strategies.sharing import DirectSteps, Sharing, is_shared_module


class DDPStrategy(DirectSteps, strategies.DDPStrategy):
    """Lightning's DDP with the HF Trainer's arguments; other modules than HFModule get Lightning's own.

    Args:
        find_unused_parameters: `None` decides as the HF Trainer: yes, unless activations are recomputed.
        timeout: of collectives.
        **arguments: those of `lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        sharing: how the ranks share the model.

    Mirrors: accelerate.Accelerator.prepare_model
    Proved by: tests/distributed/test_ddp.py
    """

    def __init__(
        self,
        find_unused_parameters: bool | None = None,
        timeout: timedelta = default_pg_timeout,
        **arguments: Any,
    ) -> None:
        if arguments.get("broadcast_buffers"):
            del arguments["broadcast_buffers"]  # torch warns of the name, whose default this is
        super().__init__(timeout=timeout, **arguments)
        self._finds_unused = find_unused_parameters
        self.sharing = Sharing(self)

    def _configure_launcher(self) -> None:
        """Start the ranks of a script that no launcher has started."""
        assert self.cluster_environment is not None
        if self._start_method != "popen":
            super()._configure_launcher()
            return
        self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_distributed(self) -> None:
        """Open the process group; what Lightning does then finds it open."""
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self._get_process_group_backend()
        open_group(self.cluster_environment, backend, timeout=self._timeout, device=self.root_device)
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Wrap the Hugging Face model, or a module that is no HFModule."""
        module: Any = self.lightning_module
        finds = self._finds_unused
        if not is_shared_module(module):
            if finds is not None:
                self._ddp_kwargs["find_unused_parameters"] = finds
            super().configure_ddp()
            return
        model: nn.Module = module.model
        if finds is None:
            finds = not getattr(model, "is_activation_checkpointing", False)
        self._ddp_kwargs = {**self._ddp_kwargs, "find_unused_parameters": finds}
        if any(p.requires_grad for p in model.parameters()):
            self.model = self._setup_model(model)
            self._register_ddp_hooks()
