"""Models that are loaded quantised.

`quantization_config`, of `model_kwargs` or of a saved model, is from_pretrained's own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.trainer_utils import validate_quantization_for_training

from hfbridge.errors import MissingDependencyError, ModelError


@contextmanager
def naming_quantization(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Name the quantisation in what from_pretrained says about it.

    Args:
        arguments: of from_pretrained.

    Raises:
        ModelError: it cannot be done on this machine, or with these arguments.
        MissingDependencyError: its package is not installed.
    """
    config: Any = arguments.get("quantization_config")
    try:
        yield
    except ImportError as error:
        if config is None:
            raise
        raise MissingDependencyError(
            f"The model cannot be loaded with quantization_config={_method_of(config)}: {error}",
            name=error.name,
        ) from error
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if config is None:
            raise
        raise ModelError(
            f"The model cannot be loaded here with quantization_config={_method_of(config)}: {error}"
        ) from error


def check_trains(model: nn.Module) -> None:
    """Refuse quantised weights that nothing trains.

    Args:
        model: about to be trained.

    Raises:
        ModelError: it has no adapters, or its quantisation does not allow them.

    Mirrors: transformers.trainer_utils.validate_quantization_for_training
    Proved by: tests/parity/test_quantized.py
    """
    try:
        validate_quantization_for_training(model)
    except ValueError as error:
        config: Any = getattr(model.config, "quantization_config", None)
        raise ModelError(
            f"This {type(model).__name__} is quantised by {_method_of(config)}, and its weights are not "
            f"trained: {error} HFModule puts adapters on it with peft_config=, such as peft.LoraConfig(r=8)."
        ) from error


def _method_of(config: Any) -> str:
    method = (
        config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    )
    named = getattr(method, "value", method)
    return str(named) if named is not None else type(config).__name__
