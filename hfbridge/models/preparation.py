"""Changes to a model between its construction and the first step, in the order of the HF Trainer.

setting                       what is done                                           undone after the run
use_liger_kernel              layers get Liger's kernels                             no
use_cache                     model.config.use_cache                                 no
activation_checkpointing      activations are recomputed in the backward             no
(a tokenizer or processor)    special tokens of config and generation config         no
neftune_noise_alpha           noise on the input embeddings while training           yes
debug="underflow_overflow"    every module's inputs and outputs are checked          yes
bf16, torch_compile           autocast around the forward; a compiled model          yes
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.debug_utils import DebugOption, DebugUnderflowOverflow
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_utils import align_special_tokens

from hfbridge.errors import ModelError
from hfbridge.models.autocast import unwrap_forward, wrap_forward
from hfbridge.models.peft import check_reentrant


class Preparation:
    """Prepare a model for a run, and undo it afterwards.

    Args:
        model: the Hugging Face model, on its device.
        args: the settings.
        processing_class: tokenizer or processor, for special tokens.
        device_type: "cpu" or "cuda".
        trains: the run trains; otherwise only `use_cache` and autocast apply.
        autocasts: `bf16` is done by autocast.
        sets_cache: set `use_cache` in the model's config.

    Attributes:
        trained: what training calls: the model, its strategy's wrapper, or that compiled.

    Raises:
        ModelError: the model does not support a setting.

    Mirrors: transformers.Trainer.train
    Proved by: tests/parity/test_model_options.py
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        processing_class: Any,
        device_type: str,
        trains: bool,
        autocasts: bool = True,
        sets_cache: bool = True,
    ) -> None:
        self._model = model
        self._undo: list[Callable[[], None]] = []
        if trains and args.use_liger_kernel:
            apply_liger_kernel(model, args.liger_kernel_config)
        if sets_cache and getattr(model, "config", None) is not None:
            model.config.use_cache = args.use_cache  # type: ignore[union-attr]
        if trains:
            self._make_ready(args, processing_class)
        if args.bf16 and autocasts:
            wrap_forward(model, device_type=device_type, dtype=torch.bfloat16)
        self._args, self._trains = args, trains
        self.trained: Any = model

    def train_through(self, wrapped: Any, context: Any = None) -> None:
        """Train through the model or its wrapper, compiled by `context` or by the settings."""
        self.trained = wrapped
        if self._trains and context is not None:
            self.trained = OptimizedModule(wrapped, context)
        elif self._trains and self._args.torch_compile:
            self.trained = compiled(wrapped, self._args)

    def undo(self) -> None:
        """Undo the changes; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        unwrap_forward(self._model)
        self.trained = self._model

    def _make_ready(self, args: TrainingArguments, processing_class: Any) -> None:
        model: Any = self._model
        if args.activation_checkpointing:
            given: Any = args.activation_checkpointing_kwargs  # a JSON string became a dict
            enable_recomputation(model, dict(given or {}))
        is_processor = isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin))
        if is_processor and hasattr(model, "config"):
            align_special_tokens(model, processing_class)
        if args.neftune_noise_alpha is not None:
            if not hasattr(model, "get_input_embeddings"):
                raise ModelError(
                    f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to input embeddings, and "
                    f"{type(model).__name__} has no get_input_embeddings. Leave it out."
                )
            hook = activate_neftune(model, args.neftune_noise_alpha)
            self._undo.append(lambda: deactivate_neftune(model, hook))
        if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
            before = {module: set(module._forward_hooks) for module in model.modules()}
            DebugUnderflowOverflow(model)
            self._undo.append(lambda: _remove_hooks_since(before))


def enable_recomputation(model: Any, arguments: dict[str, Any]) -> None:
    """Enable activation checkpointing.

    Args:
        model: the Hugging Face model.
        arguments: `activation_checkpointing_kwargs`.

    Raises:
        ModelError: the model does not support it.

    Mirrors: transformers.Trainer.train
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"activation_checkpointing=True, and {type(model).__name__} does not support it. Leave it out."
        )
    check_reentrant(model, arguments)
    every_n_layers, offload = arguments.pop("every_n_layers", 1), arguments.pop("offload", False)
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=arguments or None, every_n_layers=every_n_layers, offload=offload
    )


def takes_skip_logits(model: nn.Module) -> bool:
    """Return whether Liger's kernels give this model a loss without logits.

    Mirrors: transformers.Trainer.prediction_step
    """
    return "skip_logits" in inspect.signature(model.forward).parameters


def compiled(model: nn.Module, args: TrainingArguments) -> Any:
    """Compile the model as accelerate does; the plain model stays what is evaluated and saved.

    Mirrors: accelerate.Accelerator.prepare_model
    """
    plugin = TorchDynamoPlugin(
        backend=args.torch_compile_backend,  # type: ignore[arg-type]
        mode=args.torch_compile_mode,  # type: ignore[arg-type]
    )
    return torch.compile(model, **plugin.to_kwargs())


def _remove_hooks_since(before: dict[nn.Module, set[int]]) -> None:
    for module, known in before.items():
        for key in set(module._forward_hooks) - known:
            del module._forward_hooks[key]
