"""How ranks share the model of an HFModule under any strategy, Lightning's own among them.

Lightning's             what it does with an HFModule
SingleDeviceStrategy    nothing: each rank holds the whole model, as under DDPStrategy
FSDPStrategy            wraps all of it, and runs its steps through the wrapper
ModelParallelStrategy   leaves sharding to `configure_model`: HFModule's cuts the model as FSDP2Strategy of
                        hfbridge does; one that a subclass overrides does what it says
DeepSpeedStrategy       makes an engine of all of it, which clips by `Trainer(gradient_clip_val=)`, steps and
                        keeps the optimizer: `checkpoint-N` has none, and a run is resumed from what
                        Lightning's ModelCheckpoint writes
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import strategies
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hfbridge.errors import SettingsError
from hfbridge.strategies.deepspeed_engine import EngineSharing, copied, is_in_parts
from hfbridge.strategies.fsdp import GatheredSharing, make_outline
from hfbridge.strategies.fsdp2 import FSDP2Sharing
from hfbridge.strategies.sharing import Sharing
from hfbridge.strategies.wrap_policy import TRANSFORMER_BASED

_PREFIX = "model."  # of the Hugging Face model in an HFModule


class WrappedSharing(GatheredSharing):
    """Lightning's FSDPStrategy has wrapped the whole HFModule."""

    prefix = _PREFIX
    reads_weights = True

    def shard(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Keep what the whole model is, before the strategy wraps it."""
        if "_outline" not in vars(model):
            vars(model)["_outline"] = make_outline(model)

    def wrapper(self, model: nn.Module) -> FullyShardedDataParallel:
        """Return what is around the HFModule."""
        wrapper = self._strategy.model
        assert isinstance(wrapper, FullyShardedDataParallel)
        return wrapper

    @contextmanager
    def full_params(self, model: nn.Module) -> Iterator[None]:
        """Hold all weights on each rank for a while; all ranks enter and leave."""
        with FullyShardedDataParallel.summon_full_params(self.wrapper(model), writeback=False):
            yield


class MeshSharing(FSDP2Sharing):
    """Lightning's ModelParallelStrategy has named the ranks, and `configure_model` shards.

    Raises:
        SettingsError: the ranks are to be tensor-parallel.
    """

    reads_weights = True

    def __init__(self, strategy: strategies.ModelParallelStrategy) -> None:
        units = {"policy": TRANSFORMER_BASED, "layer_classes": None, "min_num_params": 0}
        super().__init__(strategy, reshards=True, offloads=False, units=units, recomputes=False)
        sizes = {name: strategy.device_mesh[name].size() for name in ("data_parallel", "tensor_parallel")}
        if sizes["tensor_parallel"] > 1:
            ranks = sizes["data_parallel"] * sizes["tensor_parallel"]
            raise SettingsError(
                f"ModelParallelStrategy: HFModule shards its model over data_parallel_size, and here "
                f"tensor_parallel_size={sizes['tensor_parallel']}, which is all ranks of a node unless it is "
                f"set. Pass ModelParallelStrategy(data_parallel_size={ranks}, tensor_parallel_size=1)."
            )
        module: Any = strategy.lightning_module
        self._is_ours = not module.overrides("configure_model")
        self.loads_sharded = self._is_ours

    def shard(self, model: nn.Module, **given: Any) -> None:
        """Cut the model into slices, unless a subclass does it by itself."""
        if self._is_ours:
            super().shard(model, **given)


class WrappedEngineSharing(EngineSharing):
    """Lightning's DeepSpeedStrategy has made an engine of the whole HFModule."""

    zero_config = save_parts = None
    reads_loader_first = divides_again = keeps_optimizer = reads_weights = True
    keeps_schedule = False
    before_forward = Sharing.before_forward
    forward_through = Sharing.forward_through

    def __init__(self, strategy: strategies.DeepSpeedStrategy) -> None:
        Sharing.__init__(self, strategy)
        self._told = strategy
        self.is_sharded = strategy.zero_stage_3

    @property
    def engine(self) -> Any:
        """The engine; `None` until the strategy has made it."""
        found = self._strategy.model
        return None if found is self._strategy.lightning_module else found

    def autocasts(self, model: nn.Module, *, trains: bool) -> bool:
        """Leave dtypes to the engine."""
        return False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do nothing: the engine counts the micro-batches of a step."""
        yield

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """Return the norm of the step before, by which the engine has clipped; `None` before the first."""
        return None if self.engine is None else super().clip(model, max_norm)

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the whole `state_dict` of the model on the first rank."""
        if not is_in_parts(model):
            return copied(model.state_dict()) if self._told.local_rank == 0 else None
        found = self.engine._zero3_consolidated_16bit_state_dict()
        return found and {n.removeprefix(_PREFIX): t for n, t in found.items() if n.startswith(_PREFIX)}

    def wraps(self, model: nn.Module) -> bool:
        """Whether the engine holds a model."""
        return self.engine is not None


def sharing_of(strategy: Strategy) -> Sharing:
    """Return how a strategy's ranks share the model of an HFModule.

    Raises:
        SettingsError: Lightning's ModelParallelStrategy is to make ranks tensor-parallel.

    Proved by: tests/distributed/test_lightning_strategies.py
    """
    sharing = getattr(strategy, "sharing", None)
    if isinstance(sharing, Sharing):
        return sharing
    if isinstance(strategy, strategies.FSDPStrategy):
        return WrappedSharing(strategy)
    if isinstance(strategy, strategies.ModelParallelStrategy):
        return MeshSharing(strategy)
    if isinstance(strategy, strategies.DeepSpeedStrategy):
        return WrappedEngineSharing(strategy)
    return Sharing(strategy)


def needs_equal_batches(strategy: Strategy) -> bool:
    """Whether a forward waits for those of the other ranks, so that each needs as many batches."""
    sharing = getattr(strategy, "sharing", None)
    shards = (strategies.FSDPStrategy, strategies.ModelParallelStrategy, strategies.DeepSpeedStrategy)
    return sharing.is_sharded if isinstance(sharing, Sharing) else isinstance(strategy, shards)
