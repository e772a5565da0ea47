"""Mixins of a Trainer, each of which overrides one method so that the numbers or files show it."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, DataLoader, SequentialSampler


def plain_loss(
    self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
) -> Any:
    """Weigh classes, as transformers' documentation shows; labels are popped."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    weight = torch.tensor([1.0, 3.0])
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
    return (loss, outputs) if return_outputs else loss


class Weighted:
    """Weigh classes, as transformers' documentation shows."""

    compute_loss = plain_loss


class ScaledLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = found[0] * 3 + 0.01 * len(inputs)
        return (loss, found[1]) if return_outputs else loss


class Stepped:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.9)
        return loss + self.current_gradient_accumulation_steps


class Adversarial:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        table = model.get_input_embeddings().weight
        kept = table.data.clone()
        table.data.add_(0.1 * table.grad.sign())
        with self.compute_loss_context_manager():
            attacked = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(attacked / self.args.gradient_accumulation_steps)
        table.data.copy_(kept)
        return loss + attacked.detach()


class Fewer:
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in samples:
            batch["labels"] = 1 - batch["labels"]
        return samples, items


class Flipped:
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        inputs["labels"] = 1 - inputs["labels"]
        return inputs


class Clamped:
    def _prepare_input(self, data):
        found = super()._prepare_input(data)
        return found.clamp(max=30) if isinstance(found, torch.Tensor) else found


class InBf16:
    def autocast_smart_context_manager(self):
        return torch.autocast("cpu", torch.bfloat16)


class LossContext:
    def compute_loss_context_manager(self):
        stack = super().compute_loss_context_manager()
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        return stack


class TwiceTheItems:
    def _get_num_items_in_batch(self, batch_samples, device):
        items = super()._get_num_items_in_batch(batch_samples, device)
        return None if items is None else items * 2


class OwnLoader:
    def get_train_dataloader(self):
        rows = self._remove_unused_columns(self.train_dataset, "training")
        return DataLoader(rows, batch_size=3, collate_fn=self.data_collator, shuffle=True)


class PreparedLoader:
    def get_train_dataloader(self):
        rows = self.train_dataset.remove_columns([])
        loader = DataLoader(
            rows, batch_size=5, collate_fn=self.data_collator, sampler=SequentialSampler(rows)
        )
        return self.accelerator.prepare(loader)


class InOrder:
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class Signature:
    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [name for name in self._signature_columns if name != "attention_mask"]


class Sgd:
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = [{"params": [p]} for p in (self.model if model is None else model).parameters()]
            self.optimizer = torch.optim.SGD(groups, lr=self.args.learning_rate, momentum=0.5)
        return self.optimizer


class Stairs:
    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            given = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(given, step_size=2, gamma=0.5)
        return self.lr_scheduler


class NoDecay:
    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters() if "bias" in name]


class Rmsprop:
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.RMSprop, {"lr": args.learning_rate / 10}


class Log:
    def log(self, logs, start_time=None):
        logs["seen"] = self.state.global_step * 2
        logs["in train"] = float(self.is_in_train)
        super().log(logs, start_time)


class Evaluate:
    def evaluate(self, *arguments, **named):
        found = super().evaluate(*arguments, **named)
        found["eval_loss"] += 1
        return found


class PredictionStep:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss * 2, logits, labels


class EvaluationLoop:
    def evaluation_loop(self, *arguments, **named):
        found = super().evaluation_loop(*arguments, **named)
        found.metrics["eval_own"] = found.num_samples
        return found


class EvalLoader:
    def get_eval_dataloader(self, eval_dataset=None):
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(given.select(range(7)))


class ShortNorm:
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


class ToldNorm:
    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm * 2


class ToldRate:
    def _get_learning_rate(self):
        return super()._get_learning_rate() + 1


class MoreLogs:
    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, **named
    ):
        self.control.should_log = self.state.global_step % 3 == 0
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, **named
        )


class Flos:
    def floating_point_ops(self, inputs):
        return 7 * len(inputs["labels"])


class Tokens:
    def _track_num_input_tokens(self, inputs):
        self.state.num_input_tokens_seen += 100


class MoreSamples:
    def get_total_train_batch_size(self, args):
        return super().get_total_train_batch_size(args) * 2


class Shorter:
    def set_initial_training_values(self, args, dataloader):
        found = list(super().set_initial_training_values(args, dataloader))
        found[-1] = 3
        return tuple(found)


class SaveModel:
    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        Path(output_dir or self.args.output_dir, "card.md").write_text(f"step {self.state.global_step}")


class Save:
    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        Path(output_dir, "also.json").write_text(json.dumps(sorted(self.model.state_dict())))


class SaveCheckpoint:
    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        Path(self.args.output_dir, f"saved-{self.state.global_step}").write_text(type(model).__name__)


class OwnLayout:
    """Write weights under names of one's own, and load them again."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        own = {f"own.{name}": tensor for name, tensor in self.model.state_dict().items()}
        save_file(own, Path(output_dir, "model.safetensors"))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        found = load_file(Path(resume_from_checkpoint, "model.safetensors"))
        self.model.load_state_dict({name.removeprefix("own."): found[name] for name in found})


class OwnSets:
    """Train on two sets by name, and evaluate without one."""

    def __init__(self, *, train_dataset, eval_dataset, **given):
        self.rows = eval_dataset
        super().__init__(train_dataset=None, eval_dataset="none", **given)
        half = len(train_dataset) // 2
        self.train_dataset = {
            "first": train_dataset.select(range(half)),
            "second": train_dataset.select(range(half, len(train_dataset))),
        }
        self.eval_dataset = None

    def get_train_dataloader(self):
        rows = ConcatDataset([self._remove_unused_columns(rows) for rows in self.train_dataset.values()])
        return self.accelerator.prepare(DataLoader(rows, batch_size=4, collate_fn=self.data_collator))

    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(self.rows)


class LoadBest:
    def _load_best_model(self):
        super()._load_best_model()
        with torch.no_grad():
            next(self.model.parameters()).add_(1)


class Load:
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with torch.no_grad():
            next(self.model.parameters()).add_(0.5)


class LoadOptimizer:
    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.lr_scheduler.base_lrs = [rate * 2 for rate in self.lr_scheduler.base_lrs]


class LoadRng:
    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            torch.manual_seed(77)


class BackwardTwice:
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = (
            self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        )
        self.accelerator.backward(loss, retain_graph=True)
        self.accelerator.backward(loss * 0.5, inputs=[self.model.classifier.bias])
        return loss.detach()


class PartlyClipped:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.classifier.parameters(), 0.01, 1)
        return loss


class OwnAccelerator:
    class Kind(Accelerator):
        def backward(self, loss, **kwargs):
            super().backward(loss * 2, **kwargs)

        def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
            return super().clip_grad_norm_(parameters, max_norm / 7, norm_type=1)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = self.Kind


class SetOnAccelerator:
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        backward, clip = self.accelerator.backward, self.accelerator.clip_grad_norm_
        self.accelerator.backward = lambda loss, **named: backward(loss * 3, **named)
        self.accelerator.clip_grad_norm_ = lambda parameters, norm, kind=2: clip(parameters, norm / 9, kind)


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, and never calls `Optimizer.__init__`."""

    def __init__(self, base):
        self.base, self.defaults, self.state, self.taken = base, base.defaults, base.state, 0
        self.param_groups = base.param_groups
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = self.base.step(closure)
        self.taken += 1
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, slow in zip(parameters, self.slow if self.taken % 2 == 0 else (), strict=False):
            slow.add_(parameter.detach() - slow, alpha=0.5)
            parameter.data.copy_(slow)
        return loss

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)


class Wrapped:
    def create_optimizer(self, model=None):
        self.optimizer = Lookahead(torch.optim.Adam(self.model.parameters(), lr=1e-2))
        return self.optimizer


class Halving:
    """A schedule that is none of torch's."""

    def __init__(self, optimizer):
        self.groups, self.taken = optimizer.param_groups, 0

    def step(self):
        self.taken += 1
        for group in self.groups:
            group["lr"] = 1e-2 / 2**self.taken

    def get_last_lr(self):
        return [group["lr"] for group in self.groups]

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state_dict):
        self.taken = state_dict["taken"]


class OwnSchedule:
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler, self._created_lr_scheduler = Halving(optimizer or self.optimizer), True
        return self.lr_scheduler


class ByState:
    def create_optimizer(self, model=None):
        betas = (0.9 if self.state.global_step == 0 else 0.5, 0.99)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=betas)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        steps = self.state.max_steps + self.state.global_step
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (steps + step))
        self._created_lr_scheduler = True
        return self.lr_scheduler


class TwoArguments:
    def _evaluate(self, trial, ignore_keys_for_eval):
        metrics = super()._evaluate(trial, ignore_keys_for_eval)
        metrics["eval_loss"] *= -1
        return metrics


class ByAttribute:
    def floating_point_ops(self, inputs):
        return inputs.input_ids.numel()


class LogsFlos:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.log({"flos": self.current_flos})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


CASES = {
    "create_optimizer: a wrapper": Wrapped,
    "create_scheduler: none of torch's": OwnSchedule,
    "create_optimizer: the state of the run": ByState,
    "_evaluate: two arguments": TwoArguments,
    "floating_point_ops: attributes of a batch": ByAttribute,
    "compute_loss: current_flos": LogsFlos,
    "accelerator.backward: arguments": BackwardTwice,
    "accelerator.clip_grad_norm_: some parameters": PartlyClipped,
    "accelerator: subclass": OwnAccelerator,
    "accelerator: object": SetOnAccelerator,
    "compute_loss: popped labels": Weighted,
    "compute_loss: super": ScaledLoss,
    "training_step: gradients": Stepped,
    "training_step: two backwards": Adversarial,
    "get_batch_samples": Fewer,
    "_prepare_inputs": Flipped,
    "_prepare_input": Clamped,
    "autocast_smart_context_manager": InBf16,
    "compute_loss_context_manager": LossContext,
    "_get_num_items_in_batch": TwiceTheItems,
    "get_train_dataloader": OwnLoader,
    "get_train_dataloader: prepared": PreparedLoader,
    "_get_train_sampler": InOrder,
    "_set_signature_columns_if_needed": Signature,
    "create_optimizer": Sgd,
    "create_scheduler": Stairs,
    "get_decay_parameter_names": NoDecay,
    "get_optimizer_cls_and_kwargs": Rmsprop,
    "log": Log,
    "evaluate": Evaluate,
    "prediction_step": PredictionStep,
    "evaluation_loop": EvaluationLoop,
    "get_eval_dataloader": EvalLoader,
    "_clip_grad_norm": ShortNorm,
    "_get_grad_norm": ToldNorm,
    "_get_learning_rate": ToldRate,
    "_maybe_log_save_evaluate": MoreLogs,
    "floating_point_ops": Flos,
    "_track_num_input_tokens": Tokens,
    "get_total_train_batch_size": MoreSamples,
    "set_initial_training_values": Shorter,
    "save_model": SaveModel,
    "_save": Save,
    "_save_checkpoint": SaveCheckpoint,
    "_load_best_model": LoadBest,
    "_load_best_model: own layout": OwnLayout,
    "get_train_dataloader: sets by name": OwnSets,
    "_load_from_checkpoint": Load,
    "_load_optimizer_and_scheduler": LoadOptimizer,
    "_load_rng_state": LoadRng,
}
