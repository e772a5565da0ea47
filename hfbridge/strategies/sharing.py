"""Sharing: how ranks share a model, called by HFModule at each point of a run.

Checkpoints hold full states, gathered on the first rank (`weights`, `optimizer_state`), or the ranks' own
files (`save_parts`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

S = TypeVar("S", bound=Strategy)


class Sharing:
    """How ranks share the model; here, as on a single device and in DDP, each rank has all of it.

    Args:
        strategy: the strategy that it belongs to.

    Attributes:
        is_sharded: weights are sharded.
        replaces_parameters: `shard` replaces parameters that an earlier optimizer holds.
        keeps_optimizer: only the strategy itself can save the optimizer's state.
        reads_loader_first: the strategy needs training loader and model before `configure_model`.
        divides_again: a backward divides by `accumulate_grad_batches`, as Lightning has done.
        loads_sharded: `shard` also takes a model without weights, which are loaded sharded.
        zero_config: DeepSpeed's configuration.
        save_parts: writes each rank's own files into a directory, on all ranks; `None` for full states.
        parts_to_load: the directory of such files to resume from.
        keeps_schedule: those files contain the schedule's state.
        reads_weights: the strategy itself reads all weights of a Lightning checkpoint.
    """

    is_sharded = replaces_parameters = loads_sharded = False
    reads_loader_first = divides_again = keeps_optimizer = False
    zero_config: dict[str, Any] | None = None
    save_parts: Callable[[Path], None] | None = None
    parts_to_load: str | None = None
    keeps_schedule = reads_weights = False

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def resume_from(self, folder: str | None) -> None:
        """Set the directory of the ranks' files to resume from; `None` for full states."""
        self.parts_to_load = folder

    def shard(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Shard a model in place, before it has an optimizer; an earlier run's is left as it is.

        Args:
            model: the model.
            dtype: of the forward under mixed precision; `None` without.
        """

    def autocasts(self, model: nn.Module, *, trains: bool) -> bool:
        """Whether bf16 is done by autocast."""
        return True

    def forward_through(self, model: nn.Module) -> Any:
        """Return what training calls: the model, or its wrapper."""
        wrapped = self._strategy.model
        is_wrapper = isinstance(wrapped, DistributedDataParallel) and wrapped.module is model
        return wrapped if is_wrapper else model

    def before_forward(self) -> None:
        """Prepare for the forward of a training micro-batch."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Skip the reduction of gradients, for all but a step's last micro-batch."""
        wrapped = self._strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """Clip by the global 2-norm of all gradients and return that norm, scalar; `None` if it is unknown.

        Args:
            model: its parameters' gradients are scaled in place.
            max_norm: 0 measures without clipping.

        Mirrors: transformers.Trainer._clip_grad_norm
        Mirrors: transformers.Trainer._get_grad_norm
        """
        if max_norm > 0:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    @contextmanager
    def full_params(self, model: nn.Module) -> Iterator[None]:
        """Gather all weights on each rank for a while; all ranks enter and leave."""
        yield

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the full `state_dict` on the first rank; called by all ranks, `None` on others.

        Where nothing is sharded these are the live tensors.
        """
        return model.state_dict()

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Load full weights, which every rank has read."""
        model.load_state_dict(weights)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Gather the optimizer's full `state_dict` on the first rank, `None` on others."""
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load a full optimizer state, which every rank has read."""
        optimizer.load_state_dict(state)


def is_shared_module(module: Any) -> bool:
    """Whether the forwards of a module go through `Sharing`, as HFModule's do."""
    return isinstance(getattr(type(module), "sharing", None), property)


def for_hfmodule(*names: str) -> Callable[[type[S]], type[S]]:
    """Use methods and properties of a strategy for an HFModule, and Lightning's own for any other module.

    Args:
        *names: of the methods, and of properties that are only read.
    """

    def decorate(kind: type[S]) -> type[S]:
        for name in names:
            own: Any = vars(kind)[name]
            replace = _read if isinstance(own, property) else _call
            setattr(kind, name, replace(kind, name, own))
        return kind

    return decorate


def _call(kind: type[S], name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def call(strategy: Any, *arguments: Any, **named: Any) -> Any:
        if is_shared_module(strategy.lightning_module):
            return own(strategy, *arguments, **named)
        return getattr(super(kind, strategy), name)(*arguments, **named)

    return call


def _read(kind: type[S], name: str, own: property) -> property:
    @wraps(own.fget)  # type: ignore[arg-type]
    def read(strategy: Any) -> Any:
        is_ours = is_shared_module(strategy.lightning_module)
        return own.__get__(strategy) if is_ours else getattr(super(kind, strategy), name)

    return property(read)


@for_hfmodule("training_step", "validation_step", "test_step", "predict_step")
class DirectSteps(Strategy):
    """A strategy that calls an HFModule's steps: each forward goes through what is around its model."""

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        """Call the module's step, in which each micro-batch's forward goes through its wrapper."""
        assert self.lightning_module is not None
        return self.lightning_module.training_step(*arguments, **named)

    def validation_step(self, *arguments: Any, **named: Any) -> Any:
        """Call the module's step with the unwrapped model: DDP would broadcast buffers."""
        assert self.lightning_module is not None
        return self.lightning_module.validation_step(*arguments, **named)

    def test_step(self, *arguments: Any, **named: Any) -> Any:
        """Call the module's step with the model as it is."""
        assert self.lightning_module is not None
        return self.lightning_module.test_step(*arguments, **named)

    def predict_step(self, *arguments: Any, **named: Any) -> Any:
        """Call the module's step with the model as it is."""
        assert self.lightning_module is not None
        return self.lightning_module.predict_step(*arguments, **named)
