"""ModelRun: what one run does with an HFModule's model.

built            seeded, and put into the random state in which natively training starts
prepared         models/preparation.py
shared           cut into the ranks' parts, if the strategy does that: strategies/sharing.py
optimised        optimizer and schedule, or the DeepSpeed engine that holds them: models/deepspeed_values.py
"""

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
    "The model is built whole on every rank, and cut afterwards; one that is given by its name or folder, "
    "with an auto class and without peft_config, is read in parts."
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
        args: the settings as native TrainingArguments.
        is_built: the model is there.
        label_names: names under which labels reach it; known once it is built.
        has_tried: a finder of Lightning's has trained the model, and the run has not begun.
        sharing: how the ranks share the model.
        normalization: how losses are normalised; known once the model is built.
        criterion: where they come from; likewise.
        preparation: what was done to the model, to be undone; likewise.
        preparation_s: how long what is put around the model took, with the ranks' shares; natively the
            evaluation of a model that has not trained tells of it.
        parameters: how many the model has, and how many of them are trained; likewise.
        chunked: what computes losses without logits, if asked for; likewise.
        notes_update: the optimizer notes itself when it begins to change the weights.

    Raises:
        ModelError: `optimizers` was given, and the strategy replaces the parameters in it.
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
            self.args.deepspeed = settings.deepspeed  # for those who look at the arguments
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
        """Seed, build the model if it is not there, see that all ranks have the same, and return it.

        Args:
            build: makes a model that is not there yet.
            in_parts: it can be read in parts.
            seeds_again: what it draws is natively drawn before the Trainer is made, which seeds again.

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
        """Build the model as Lightning would later, unless the strategy cuts it into parts."""
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
        """Make the model ready: its loss, its forward, and each rank's part of it."""
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
        """Choose where losses come from and how they are normalised."""
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
        """Whether micro-batches are brought to the dtype that DeepSpeed computes in."""
        return self._zero is not None

    def configure_optimizers(self, *, max_steps: int, parts: Any = None) -> Any:
        """Make optimizer and schedule as the HF Trainer does; returns what Lightning wants of them.

        Args:
            max_steps: optimizer steps of the run.
            parts: has the methods that make them; by default the HF Trainer's own.
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
        """Step another optimizer from now on; the schedule stays that of the first."""
        self._module.trainer.optimizers = [optimizer]
        self._run_closures_first(optimizer)

    def _run_closures_first(self, optimizer: Any) -> None:
        self._undo_closures()
        self.notes_update = True
        self._undo_closures = run_closures_first(optimizer, self._module.last_step)

    def begin_training(self) -> None:
        """Train through what the strategy has put around the model; of a part of it, tell how large."""
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
        """Keep the random states in which training is to start, where a finder of Lightning's comes first."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(cb, BatchSizeFinder | LearningRateFinder) for cb in callbacks):
            self._random_states = rng.capture()

    def begin_trial(self) -> None:
        """Train for a finder of Lightning's, which comes before the run and without callbacks."""
        self.has_tried = True
        self.begin_training()

    def end_trials(self, trainer: pl.Trainer) -> None:
        """Begin as without trials, but with the batch size and the learning rate that they have found."""
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
        """Count what the loss divides by in an optimizer step, before its first micro-batch is trained.

        Args:
            step: its micro-batches are still on the CPU.

        Raises:
            ModelError: the model does not keep the samples of packed rows apart, or its loss cannot be
                computed in chunks.

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
        """Check that the first step has labels, and that the model keeps the samples of packed rows apart."""
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
        by = "packing=" if is_ours else "A collator that puts several samples into a row"
        try:
            with raise_on_all_ranks():
                check_packing_isolation(module.model, first["input_ids"], packed_by=by)
        except ModelError as error:
            if is_ours or module.loss_normalization == "exact":
                raise
            module.info_once(f"{error} It is trained all the same, as by transformers.Trainer.")

    def warn_of_mean(self) -> None:
        """Note what Lightning's mean over the micro-batches of a step means, where items differ."""
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
            inputs: columns by name.
            step: that it belongs to; `None` for one whose step is not known, which gets its own mean loss.
            index: its number in the step.

        Mirrors: transformers.Trainer.training_step
        """
        loss: Tensor
        inputs = self.prepare_inputs(inputs)
        if self._prepares_forward:
            self.sharing.before_forward()
        if step is None:
            alone = self.normalization.loss_for(self._module.model, [inputs])
            items = alone.count([inputs], self._device)
            loss = alone.train(self.preparation.trained, inputs, items, 0, 1)
        else:
            size = len(step.micro_batches)
            loss = step.loss.train(self.preparation.trained, inputs, step.items, index, size)
        return loss

    def prepare_inputs(self, inputs: Any) -> Any:
        """Copy a micro-batch to the device, and cast it to what DeepSpeed computes in.

        Raises:
            DataError: the first one is no dict, or holds arrays.
        """
        if not self._has_looked:
            check_batch(inputs)
            check_arrays(inputs)
            self._has_looked = True
        if self._device.type != "cpu":
            inputs = send_to_device(inputs, self._device, non_blocking=True)
        return inputs if self._zero is None else self._zero.cast(inputs)

    def close(self) -> None:
        """Give the model, and an optimizer of the user's, back as they were; a second call does nothing."""
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
