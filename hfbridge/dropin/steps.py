"""An HFModule that calls what a Trainer's subclass overrides, when the HF Trainer would call it.

overridden                                    called from
training_step, compute_loss, _prepare_...     training_step; `accelerator.backward` goes to the strategy if it
                                                is not overridden itself
_clip_grad_norm, _get_grad_norm               configure_gradient_clipping
create_optimizer, create_scheduler, ...       configure_optimizers
_get_learning_rate                            optimizer_step
_load_from_checkpoint                         on_load_checkpoint
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hfbridge.callbacks.connector import current_micro_batch
from hfbridge.checkpoints import layout
from hfbridge.dropin.replaced_methods import CLIPS, OPTIMIZES, STEPS, Overrides
from hfbridge.module import HFModule


class OwnSteps(HFModule):
    """An HFModule that calls a Trainer's methods, where its class or the object overrides them.

    Attributes:
        native: the Trainer.
        overrides_of: what it overrides.
        resumed_from: the checkpoint that its run is resumed from.
        has_run_backward: `training_step` runs the backward, and Lightning's does nothing.
        own_predict_step: is called in place of `predict_step`.

    Proved by: tests/dropin/test_overrides.py
    """

    native: Any
    overrides_of: Overrides
    resumed_from: str | None = None
    has_run_backward = False
    own_predict_step: Callable[[], None] | None = None

    def attach_to(self, native: Any, overrides: Overrides) -> None:
        """Call the methods of a Trainer."""
        self.native, self.overrides_of = native, overrides
        self.sets_use_cache = native.model_init is None  # which the HF Trainer does once, for its first model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute a micro-batch's gradients, as the Trainer's `training_step` does.

        Mirrors: transformers.Trainer._run_epoch
        """
        if not self.overrides_of.any(STEPS):
            return super().training_step(batch, batch_idx)
        native, run = self.native, self.run
        micro_batch = current_micro_batch(self.trainer, batch)
        assert micro_batch is not None
        step = micro_batch.step
        assert step is not None
        if step.loss is not native:  # of HFDataModule: what is overridden was set during the run
            items = native._get_num_items_in_batch(step.micro_batches, native.args.device)
            step.begin(native, items)
            native.current_gradient_accumulation_steps = len(step.micro_batches)
        native.accelerator.gradient_state._set_sync_gradients(micro_batch.is_last)
        source = dict(micro_batch) if micro_batch.source is None else micro_batch.source
        inputs = run.prepare_inputs(source) if run.casts_inputs else source
        run.sharing.before_forward()
        with self._routed():
            loss: Tensor = native.training_step(run.preparation.trained, inputs, step.items)
        self.host.add_micro_batch(loss.detach(), source)
        return loss

    @contextmanager
    def _routed(self) -> Iterator[None]:
        """Route `accelerator.backward` and, of a sharded model, `clip_grad_norm_` through the strategy."""
        accelerator, plugin = self.native.accelerator, self.trainer.precision_plugin
        optimizer = next(iter(self.trainer.optimizers), None)

        def backward(loss: Tensor, **arguments: Any) -> None:
            self.has_run_backward = False
            arguments.pop("scale_wrt_gas", None)
            plugin.backward(loss, self, optimizer, **arguments)
            self.has_run_backward = True

        def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor | None:
            return self.sharing.clip(self.model, 0.0 if max_norm == float("inf") else float(max_norm))

        host: Any = self.host
        routes: dict[str, Any] = {"clip_grad_norm_": clip} if host.is_shared else {}
        if not self.overrides_of.any({"accelerator.backward"}):
            routes["backward"] = backward
        with _attributes(accelerator, **routes):
            self.has_run_backward = True
            try:
                yield
            finally:
                self.has_run_backward = self.overrides_of.any(STEPS)

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        """Run a backward, unless `training_step` has done so."""
        if not self.has_run_backward:
            super().backward(loss, *arguments, **named)

    def configure_optimizers(self) -> Any:
        """Make optimizer and schedule by the Trainer's methods."""
        if not self.overrides_of.any(OPTIMIZES):
            return super().configure_optimizers()
        self.ensure_ready()
        host: Any = self.host
        host.show_state(self)
        return self.run.configure_optimizers(max_steps=self.data.schedule.max_steps, parts=self.native)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradients by the Trainer's methods, and keep their norm."""
        if not self.overrides_of.any(CLIPS):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        native, norm, trained = self.native, None, self.run.preparation.trained
        self.host.end_micro_batch()
        self.host.checkpoints.before_step()
        with self._routed():
            if native.args.max_grad_norm > 0:
                norm = native._clip_grad_norm(trained)
            norm = native._get_grad_norm(trained, grad_norm=norm)
        if norm is not None and not isinstance(norm, Tensor):
            norm = torch.tensor(norm, dtype=torch.float64)
        self.last_step.grad_norm = norm
        self.host.fire("on_pre_optimizer_step")

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take the step, and keep the learning rate of the Trainer's method."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.overrides_of.any({"_get_learning_rate"}):
            self.last_step.learning_rate = self.native._get_learning_rate()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Predict a batch, or call `own_predict_step`."""
        if self.own_predict_step is None:
            return super().predict_step(batch, batch_idx, dataloader_idx)
        return self.own_predict_step()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the weights by the Trainer's method, if that or the model's `load_state_dict` is overridden.

        A run restarted with smaller batches keeps its weights.
        """
        loads_itself = type(self.model).load_state_dict is not nn.Module.load_state_dict
        loads_itself &= not self.sharing.is_sharded
        is_overridden = loads_itself or self.overrides_of.any({"_load_from_checkpoint"})
        if is_overridden and self.resumed_from is not None and self._reused_optimizer is None:
            self.native._load_from_checkpoint(self.resumed_from)
            checkpoint["state_dict"] = {
                f"{layout.PREFIX}{name}": tensor for name, tensor in self.model.state_dict().items()
            }
        super().on_load_checkpoint(checkpoint)


@contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object temporarily."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)
