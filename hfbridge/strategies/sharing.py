"""What a strategy of hfbridge adds to one of Lightning's: how ranks share a model.

HFModule asks its strategy's `Sharing` wherever it matters who holds what:

    when                            asked
    the run is set up               zero_config
    the model is built              shard, autocasts
    the optimizer is made           train, init_inference (DeepSpeed's)
    the run begins                  forward_through
    each micro-batch                before_forward; backward
    each but a step's last          no_sync, around its forward and backward
    a step's last backward          clip
    a checkpoint is written         weights, optimizer_state: whole, on the first rank; save_parts
    a run goes on                   load_weights, load_optimizer_state; parts_to_load
    a model generates               whole

A `Sharing` by itself is that of a single device and of DDP, where every rank holds everything.
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
    """How the ranks of a run share the model; here each rank holds all of it.

    Args:
        strategy: the strategy that it belongs to.

    Attributes:
        is_sharded: each rank holds a part of the weights only.
        replaces_parameters: an optimizer made before `shard` holds parameters that are no longer the model's.
        keeps_optimizer: its state can only be saved by the strategy itself.
        reads_loader_first: the strategy asks for the training loader, which asks the model, before
            `configure_model`.
        divides_again: a backward divides by `accumulate_grad_batches`, as Lightning has done.
        loads_sharded: `shard` also takes a model without weights, and the ranks' parts are loaded into it.
        zero_config: what DeepSpeed was told, if it is used.
        save_parts: writes what each rank holds into a directory, in files of its own; called by all ranks.
            `None` where checkpoints hold whole states.
        parts_to_load: the directory of such files that a run goes on from.
        keeps_schedule: those files hold the state of the schedule, too.
        reads_weights: the strategy itself reads the weights of a Lightning checkpoint, all of them.
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
        """Take the directory of the ranks' files that a run goes on from; `None` for whole states."""
        self.parts_to_load = folder

    def shard(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Cut a model into the ranks' parts, in place, before it has an optimizer.

        It stays what HFModule holds, and what users call, on all ranks together.

        Args:
            model: the model; one that an earlier run has cut is left so.
            dtype: in which a forward computes under mixed precision; `None` without.
        """

    def autocasts(self, model: nn.Module, *, trains: bool) -> bool:
        """Whether bf16 is for autocast to do, in a run that trains or in one that does not."""
        return True

    def forward_through(self, model: nn.Module) -> Any:
        """Return what the forward of a training micro-batch is called on: the model, or what wraps it."""
        wrapped = self._strategy.model
        is_wrapper = isinstance(wrapped, DistributedDataParallel) and wrapped.module is model
        return wrapped if is_wrapper else model

    def before_forward(self) -> None:
        """Prepare for the forward of a training micro-batch."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Make the context of a micro-batch that is not its step's last: gradients are not exchanged."""
        wrapped = self._strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """Clip by the global 2-norm of all gradients and return that norm as it was before, scalar.

        `None` if nobody has computed it.

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
        """Hold all weights on each rank for a while; all ranks enter and leave."""
        yield

    def weights(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Gather the whole `state_dict` of the model; called by all ranks, `None` on all but the first.

        Where nothing is sharded these are the live tensors.
        """
        return model.state_dict()

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put whole weights, which every rank has read, into the model."""
        model.load_state_dict(weights)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Gather the whole `state_dict` of the optimizer, in the form it has on a single device.

        Called by all ranks; `None` on all but the first.
        """
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Put a whole optimizer state, which every rank has read, into the optimizer."""
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
        """Call the module's step with the model as it is, as natively: DDP would send buffers round."""
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
