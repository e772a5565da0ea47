"""ModelRun: an HFModule's model in one run: built, prepared, sharded, optimized."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate.utils import send_to_device
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from transformers import TrainingArguments, enable_full_determinism, set_seed

from hfbridge.callbacks.connector import end_with
from hfbridge.callbacks.run_data import UserData
from hfbridge.data.accumulation import AccumulationStep, check_batch
from hfbridge.data.limits import check_arrays
from hfbridge.distributed.collectives import gather, raise_on_all_ranks, rank
from hfbridge.distributed.consistency import compare
from hfbridge.errors import BridgeWarning, ModelError
from hfbridge.evaluation.generation import prepare_generation
from hfbridge.evaluation.prediction_step import cast_for_evaluation
from hfbridge.losses.chunked import ChunkedLoss
from hfbridge.losses.criterion import Criterion, criterion_of
from hfbridge.losses.item_counts import count_items, read_traits
from hfbridge.losses.normalization import Normalization
from hfbridge.models.deepspeed_values import ZeroConfig, build_engine
from hfbridge.models.forward_errors import check_vocabulary
from hfbridge.models.loading import weights_dtypes
from hfbridge.models.optimizers import (
    NativeParts,
    as_torch,
    build_optimizer,
    follows_metric,
    run_closures_first,
)
from hfbridge.models.packing_check import check_packing_isolation, is_packed
from hfbridge.models.peft import ParameterCounts, count_parameters
from hfbridge.models.preparation import Preparation
from hfbridge.models.quantization import check_trains
from hfbridge.models.signature import facts_of_model, hides_labels, label_names_of
from hfbridge.settings import Settings
from hfbridge.strategies import Sharing, rank_variables, sharing_of
from hfbridge.utilities import rng

_BUILT_WHOLE = (
    "The model is built in full on every rank, and sharded afterwards. Pass its name or folder with an auto "
    "class and without peft_config to load it sharded."
)
_FOLDERS = (
    "output_dir differs between ranks; all use that of rank 0, {!r}. Leave times, ranks and random names out "
    "of it."
)
_NO_LABELS = (
    "All labels of the first optimizer step are ignored (-100): its loss is 0, and nothing is learned from "
    "it. Where that is not meant, see whether truncation cuts off the part that has labels, or the collator "
    "masks it."
)
_HIDDEN_LABELS = (
    "The forward of {} names no labels, so that evaluations give no eval_loss and do not call "
    "compute_metrics, as with transformers.Trainer. If it takes labels, pass "
    'label_names=["labels"] in the settings.'
)


class ModelRun:
    """The model of an HFModule in one run.

    Args:
        module: the HFModule, attached to its Trainer, whose process group is open.
        settings: of the run.

    Attributes:
        args: the settings as TrainingArguments.
        is_built: the model exists.
        label_names: names of the labels in a batch; set once the model is built.
        has_tried: a finder of Lightning's has trained the model, and the run has not begun.
        sharing: how the ranks share the model.
        normalization: chooses the loss; set by `prepare`, as are the next five.
        criterion: computes the loss.
        preparation: changes to the model, to be undone.
        preparation_s: seconds that wrapping and sharding took.
        parameters: numbers of parameters, all and trained.
        chunked: computes losses without logits.
        notes_update: the optimizer records when it begins to change the weights.

    Raises:
        ModelError: `optimizers` was passed, and the strategy replaces the parameters in it.
    """

    normalization: Normalization
    criterion: Criterion
    preparation: Preparation
    preparation_s: float
    parameters: ParameterCounts
    label_names: list[str]

    def __init__(self, module: Any, settings: Settings) -> None:
        self._module = module
        trainer: pl.Trainer = module.trainer
        self._device = trainer.strategy.root_device
        with rank_variables(trainer.strategy):
            self.args: TrainingArguments = settings.as_training_arguments(use_cpu=self._device.type == "cpu")
        self.sharing: Sharing = sharing_of(trainer.strategy)
        self._prepares_forward = type(self.sharing).before_forward is not Sharing.before_forward
        self._engines: Any = self.sharing  # of DeepSpeed's, with `train` and `init_inference`
        self._zero: ZeroConfig | None = None
        if self.sharing.zero_config is not None:
            self.args.deepspeed = settings.deepspeed
            self._zero = ZeroConfig(self.sharing.zero_config, self.args)
        if self.sharing.replaces_parameters and module._user_optimizers != (None, None):
            raise ModelError(
                "optimizers holds the parameters of the whole model, and the strategy puts others in their "
                "place. Pass optimizer_cls_and_kwargs=(class, arguments), or name the optimizer by optim."
            )
        self.chunked: ChunkedLoss | None = None
        self._undo_closures: Callable[[], None] = _nothing
        self.notes_update = False
        self.is_built = self._has_looked = self._trains = self._has_begun = self.has_tried = False
        self._planned: tuple[int, float] | None = None
        self._random_states: Any = None
        self._compares = False

    def build(self, build: Any, *, in_parts: bool, seeds_again: bool) -> nn.Module:
        """Seed, build the model if needed, compare it across ranks, and return it.

        Args:
            build: makes the model.
            in_parts: it can be loaded sharded.
            seeds_again: seed again after building, as `transformers.Trainer` does.

        Raises:
            RankError: the ranks' models differ.
        """
        args, module, self.is_built = self.args, self._module, True
        seed_all = enable_full_determinism if args.full_determinism else set_seed
        if not module.is_built or module.evaluator.is_first_run:
            seed_all(args.seed)
        if self.sharing.loads_sharded and not in_parts:
            module.info_once(_BUILT_WHOLE)
        if module.is_built:
            model: nn.Module = module.model
        else:
            shard = partial(self.sharing.shard, dtype=self._mixed)
            model = build(shard=shard if self.sharing.loads_sharded and in_parts else None)
            if seeds_again:
                seed_all(args.seed)
        folders = compare(lambda: facts_of_model(model), beside=args.output_dir)
        if len(set(folders)) > 1:
            warnings.warn(_FOLDERS.format(folders[0]), BridgeWarning, stacklevel=2)
            args.output_dir = folders[0]
        self.parameters = count_parameters(model, getattr(model, "_outline", None))
        self.label_names = self._label_names(model)
        return model

    def _label_names(self, model: nn.Module) -> list[str]:
        if self.args.label_names is not None:
            return list(self.args.label_names)
        if not hides_labels(model):
            return label_names_of(model)
        if self._module.loss_normalization == "exact":
            return ["labels"]
        self._module.info_once(_HIDDEN_LABELS.format(type(model).__name__))
        return []

    def build_early(self) -> None:
        """Build the model before Lightning does, unless the strategy shards it."""
        sharing, trainer = self.sharing, self._module.trainer
        if sharing.reads_loader_first:
            self._module.ensure_ready()
        if sharing.is_sharded or sharing.replaces_parameters or sharing.zero_config is not None:
            return
        with (
            trainer.strategy.tensor_init_context(),
            trainer.strategy.model_sharded_context(),
            trainer.precision_plugin.module_init_context(),
        ):
            self._module.ensure_ready()

    def prepare(self) -> None:
        """Prepare the model's loss and forward, and shard it."""
        args, module = self.args, self._module
        model, is_fit = module.model, module.trainer.state.fn == TrainerFn.FITTING
        if is_fit:
            check_trains(model)
        prepare_generation(
            model,
            args,
            processing_class=module.processing_class,
            is_first=module.evaluator.is_first_run,
            saves=is_fit and args.save_strategy != "no",
        )
        check_vocabulary(model, module.processing_class)
        if module.chunked_loss:
            is_sharded = self._zero is not None and self._zero.is_sharded
            self.chunked = ChunkedLoss(model, args, is_sharded=is_sharded)
        self.normalization = self._normalize()
        began_s = time.perf_counter()
        self.preparation = Preparation(
            model,
            args,
            processing_class=module.processing_class,
            device_type=self._device.type,
            trains=is_fit,
            autocasts=self.sharing.autocasts(model, trains=is_fit),
            sets_cache=module.sets_use_cache,
        )
        other = weights_dtypes(model) - {torch.float32}
        if is_fit and other and self._zero is None:
            module.info_once(
                f"The weights are {', '.join(sorted(map(str, other)))} and are trained as such; for float32 "
                "weights pass dtype=torch.float32 to from_pretrained, or to HFModule."
            )
        if not is_fit and self._zero is not None and self._zero.is_sharded:
            self._engines.init_inference(model, self._zero.for_evaluation(model))
        elif not is_fit:
            cast_for_evaluation(model, args)
        self.sharing.shard(model, dtype=self._mixed)
        self.preparation_s = time.perf_counter() - began_s

    def _normalize(self) -> Normalization:
        """Choose criterion and normalization."""
        args, module, model = self.args, self._module, self._module.model
        hook = module.compute_loss if module.overrides("compute_loss") else None
        self.criterion = criterion_of(
            model,
            smoothing=args.label_smoothing_factor,
            function=module.compute_loss_func,
            forgets_shift=module.loss_normalization == "native",
            chunked=self.chunked,
            hook=hook,
        )
        traits = read_traits(model, has_function=module.compute_loss_func is not None)
        if hook is not None:  # returns the mean over a micro-batch
            traits = replace(traits, takes_items=False, counts_natively=False)
        return Normalization(
            module.loss_normalization,
            traits,
            self.criterion,
            ranks=module.trainer.world_size,
            counts_all=args.average_tokens_across_devices,
        )

    @property
    def casts_inputs(self) -> bool:
        """Whether micro-batches are cast to DeepSpeed's dtype."""
        return self._zero is not None

    def configure_optimizers(self, *, max_steps: int, parts: Any = None) -> Any:
        """Make optimizer and schedule as the HF Trainer does, in the form that Lightning expects.

        Args:
            max_steps: optimizer steps of the run.
            parts: makes them; by default the HF Trainer's own methods.
        """
        module, self._planned = self._module, (max_steps, self._module.learning_rate)
        self.args.learning_rate = module.learning_rate
        if parts is None:
            optimizers = (module._reused_optimizer or module._user_optimizers[0], module._user_optimizers[1])
            parts = NativeParts(
                module.model,
                self.args,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=module.optimizer_cls_and_kwargs,
            )
        module._reused_optimizer, steps_itself = None, False
        if self._zero is None:
            optimizer, module.schedule = build_optimizer(parts, max_steps=max_steps)
        else:
            optimizer, module.schedule, steps_itself = build_engine(
                parts, self._zero, self._engines.train, max_steps=max_steps
            )
        self._run_closures_first(optimizer)
        if steps_itself or follows_metric(module.schedule):
            return optimizer  # the schedule is stepped by the engine, or by the host after evaluations
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": as_torch(module.schedule, optimizer), "interval": "step"},
        }

    def replace_optimizer(self, optimizer: Any) -> None:
        """Replace the optimizer; the schedule stays."""
        self._module.trainer.optimizers = [optimizer]
        self._run_closures_first(optimizer)

    def _run_closures_first(self, optimizer: Any) -> None:
        self._undo_closures()
        self.notes_update = True
        self._undo_closures = run_closures_first(optimizer, self._module.last_step)

    def begin_training(self) -> None:
        """Train through the strategy's wrapper; if some parameters are frozen, log how many are trained."""
        optimizers = self._module.trainer.optimizers
        self.optimizers_to_training = [o.train for o in optimizers if hasattr(o, "train")]
        if self._trains:
            return
        self._trains = True
        if self.parameters.trained < self.parameters.total:
            self._module.info_once(str(self.parameters))
        module = self._module
        self.preparation.train_through(self.sharing.forward_through(module.model), module.compile_context)

    def expect_trials(self, trainer: pl.Trainer) -> None:
        """Save the random states if a finder of Lightning's trains before the run."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(cb, BatchSizeFinder | LearningRateFinder) for cb in callbacks):
            self._random_states = rng.capture()

    def begin_trial(self) -> None:
        """Train for a finder of Lightning's."""
        self.has_tried = True
        self.begin_training()

    def end_trials(self, trainer: pl.Trainer) -> None:
        """Restore the state before the trials, with the batch size and learning rate that they found."""
        if not self.has_tried:
            return
        module, self.has_tried = self._module, False
        data = module.data
        if isinstance(data, UserData):
            data.plan_again()
        end_with(trainer, data.schedule)
        if self._planned not in (None, (data.schedule.max_steps, module.learning_rate)):
            trainer.strategy.setup_optimizers(trainer)
        if self._random_states is not None:
            rng.restore(self._random_states)

    def begin_step(self, step: AccumulationStep) -> None:
        """Count a step's items, and on the first step check batches, packing and loss.

        Args:
            step: its micro-batches are still on the CPU.

        Raises:
            ModelError: the model does not isolate packed samples, or its loss cannot be computed in chunks.

        Mirrors: transformers.Trainer.get_batch_samples
        """
        normalization, model = self.normalization, self._module.model
        if not self._has_begun:
            self._check_first(step)
        inputs: list[Any] = step.micro_batches
        if not normalization.is_settled:
            inputs = [self.prepare_inputs(micro_batch) for micro_batch in inputs]
        loss = normalization.loss_for(model, inputs)
        step.begin(loss, loss.count(step.micro_batches, self._device))
        if not self._has_begun:
            self._has_begun = True
            self._compares = self._module.host.state.global_step == 0
            if self.chunked is not None:
                self.chunked.check(self.prepare_inputs(step.micro_batches[0]))
        if self._compares and normalization.is_settled:
            self._compares = False
            self._module.info_once(normalization.compare(step.micro_batches))

    def _check_first(self, step: AccumulationStep) -> None:
        """Check that the first step has labels, and that the model isolates packed samples."""
        module, micro_batches = self._module, step.micro_batches
        if not any(count_items(inputs, self.normalization.traits) for inputs in micro_batches):
            warnings.warn(_NO_LABELS, BridgeWarning, stacklevel=2)
        is_ours = module.data.packing is not None
        if not is_ours and "position_ids" not in micro_batches[0]:
            return
        packed = gather(next((n for n, inputs in enumerate(micro_batches) if is_packed(inputs)), None))
        if not is_ours and set(packed) == {None}:
            return
        first = self.prepare_inputs(micro_batches[packed[rank()] or 0])
        by = "packing=" if is_ours else "A collator that packs several samples into one"
        try:
            with raise_on_all_ranks():
                check_packing_isolation(module.model, first["input_ids"], packed_by=by)
        except ModelError as error:
            if is_ours or module.loss_normalization == "exact":
                raise
            module.info_once(f"{error} It is trained all the same, as by transformers.Trainer.")

    def warn_of_mean(self) -> None:
        """Log what the mean over a user's micro-batches means."""
        module = self._module
        accumulation = module.trainer.accumulate_grad_batches
        if accumulation > 1 and module.automatic_optimization:
            module.info_once(
                "The training batches come from a loader of your own: with accumulate_grad_batches="
                f"{accumulation} a step's loss is the mean of its micro-batches' mean losses. "
                "Where they hold different numbers of labels, that is not the mean over all labels of the "
                "step, which HFDataModule and hfbridge.Trainer compute."
            )

    def loss_share(self, inputs: Any, step: AccumulationStep | None, index: int) -> Tensor:
        """Compute a micro-batch's share of its optimizer step's loss, scalar.

        Args:
            inputs: the micro-batch.
            step: its optimizer step; `None` for its own mean loss.
            index: its number in the step.

        Mirrors: transformers.Trainer.training_step
        """
        inputs = self.prepare_inputs(inputs)
        if self._prepares_forward:
            self.sharing.before_forward()
        if step is None:
            alone = self.normalization.loss_for(self._module.model, [inputs])
            items = alone.count([inputs], self._device)
            return alone.train(self.preparation.trained, inputs, items, 0, 1)
        size = len(step.micro_batches)
        loss: Tensor = step.loss.train(self.preparation.trained, inputs, step.items, index, size)
        return loss

    def prepare_inputs(self, inputs: Any) -> Any:
        """Copy a micro-batch to the device, and cast it to DeepSpeed's dtype.

        Raises:
            DataError: the first one is no dict, or contains arrays.
        """
        if not self._has_looked:
            check_batch(inputs)
            check_arrays(inputs)
            self._has_looked = True
        if self._device.type != "cpu":
            inputs = send_to_device(inputs, self._device, non_blocking=True)
        return inputs if self._zero is None else self._zero.cast(inputs)

    def close(self) -> None:
        """Undo changes to the model and the user's optimizer; a second call does nothing."""
        if "preparation" in vars(self):
            self.preparation.undo()
        if self.chunked is not None:
            self.chunked.undo()
        self._undo_closures()
        self._undo_closures = _nothing
        if self._zero is not None:
            self._zero.close()
            self._zero = None

    @property
    def _mixed(self) -> torch.dtype | None:
        return torch.bfloat16 if self.args.bf16 else None


def _nothing() -> None:
    pass
