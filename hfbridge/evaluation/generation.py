"""Evaluate by generating (`predict_with_generate`), and decode the predictions.

"native" predicts, gathers and averages like `transformers.Seq2SeqTrainer`: `compute_loss_func` is ignored,
smoothed labels are not shifted, and samples that pad the last round are kept. "exact" evaluates as ever.

Predictions of a decoder-only model begin with its `input_ids`, so evaluation samples are prompts without
answers, padded on the left; `labels`, of the same length, are for the loss only.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PredictionOutput

from hfbridge.errors import DataError, ModelError, SettingsError
from hfbridge.evaluation.prediction_step import Batch, Prediction

_PADDING = -100
_OF_LABELS = frozenset({"decoder_input_ids", "decoder_attention_mask"})


def is_generating(args: TrainingArguments) -> bool:
    """Whether evaluations generate, which only `Seq2SeqTrainingArguments` can set."""
    return bool(getattr(args, "predict_with_generate", False))


@dataclass(frozen=True)
class Generation:
    """How evaluations generate.

    Attributes:
        arguments: of `generate`.
        processing_class: tokenizer or processor with the pad token; `None` for the model's.
        weight_by_sample: compute the loss of the HF Trainer.
        smoothing: `label_smoothing_factor`, for that loss.

    Proved by: tests/parity/test_generation.py
    """

    arguments: Mapping[str, Any]
    processing_class: Any
    weight_by_sample: bool
    smoothing: float = 0.0

    @classmethod
    def of(
        cls, args: Any, *, given: Mapping[str, Any], processing_class: Any, weight_by_sample: bool
    ) -> "Generation":
        """Complete the arguments of `generate` by the settings.

        Args:
            args: `Seq2SeqTrainingArguments`: `generation_max_length` and `generation_num_beams` are defaults.
            given: arguments that take precedence.
            processing_class: as above.
            weight_by_sample: as above.

        Mirrors: transformers.Seq2SeqTrainer.evaluate
        """
        arguments = dict(given)
        has_length = arguments.get("max_length") is not None or arguments.get("max_new_tokens") is not None
        if not has_length and args.generation_max_length is not None:
            arguments["max_length"] = args.generation_max_length
        if arguments.get("num_beams") is None and args.generation_num_beams is not None:
            arguments["num_beams"] = args.generation_num_beams
        return cls(arguments, processing_class, weight_by_sample, args.label_smoothing_factor)

    def predict(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        loss_of: Callable[[nn.Module, Batch], tuple[Tensor, Any, int]],
    ) -> Prediction:
        """Generate for one batch, and compute its loss if it has labels.

        Args:
            model: the Hugging Face model, in eval mode.
            batch: inputs and labels, on the model's device.
            loss_of: computes loss, outputs and items of a batch, in "exact".

        Returns:
            The token ids as logits, [batch, length].

        Raises:
            DataError: the prompts are as long as the maximum length.

        Mirrors: transformers.Seq2SeqTrainer.prediction_step
        """
        weight = 0

        def exactly(**inputs: Any) -> dict[str, Any]:
            nonlocal weight
            loss, _, weight = loss_of(model, inputs)
            return {"loss": loss}

        smoother = LabelSmoother(epsilon=self.smoothing) if self.weight_by_sample and self.smoothing else None
        stand_in: Any = _StandIn(model, self.processing_class, smoother, dict(self.arguments))
        try:
            called: Any = model if self.weight_by_sample else exactly
            found: Any = Seq2SeqTrainer.prediction_step(
                stand_in, called, dict(batch), prediction_loss_only=False
            )
        except ValueError as error:
            if not str(error).startswith("Input length of"):
                raise
            raise DataError(
                f"Nothing can be generated: {str(error).partition('. This')[0]}. The prompt counts in "
                "max_length: raise generation_max_length above the longest prompt, or leave it out and pass "
                "generation_config=GenerationConfig(max_new_tokens=...)."
            ) from error
        loss, tokens, labels = found
        return Prediction(loss, weight, tokens, labels)

    def tokens(self, model: nn.Module, batch: Batch) -> Tensor:
        """Generate for one batch, labelled or not: token ids, [batch, length]."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels, decoded = batch.get("labels"), batch.get("decoder_input_ids")
        if labels is not None and decoded is not None and labels.shape == decoded.shape:  # made of them
            inputs = {name: inputs[name] for name in inputs.keys() - _OF_LABELS}
        tokens: Tensor = self.predict(model, inputs, loss_of=_no_loss).logits
        return tokens


def _no_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any, int]:
    raise AssertionError("a batch without labels has no loss")  # pragma: no cover


class _StandIn(SimpleNamespace):
    """What `Seq2SeqTrainer.prediction_step` reads of its Trainer.

    The names are pinned by tests/unit/evaluation/test_generation.py.
    """

    args = SimpleNamespace(predict_with_generate=True, prediction_loss_only=False)
    compute_loss_context_manager = nullcontext
    _pad_tensors_to_max_len = Seq2SeqTrainer._pad_tensors_to_max_len

    def __init__(
        self, model: nn.Module, processing_class: Any, smoother: LabelSmoother | None, arguments: Any
    ) -> None:
        super().__init__(
            model=model, processing_class=processing_class, label_smoother=smoother, _gen_kwargs=arguments
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


def prepare_generation(model: Any, args: Any, *, processing_class: Any, is_first: bool, saves: bool) -> None:
    """Set the model's `generation_config` from the settings, and check that evaluations can generate.

    Args:
        model: the Hugging Face model.
        args: the settings.
        processing_class: tokenizer or processor, or `None`.
        is_first: the model was not used in a run before; the HF Trainer sets the configuration once.
        saves: the run writes checkpoints.

    Raises:
        SettingsError: `generation_config` cannot be read, or is not valid.
        ModelError: the model cannot generate, there is no pad token, or its configuration cannot be saved.

    Mirrors: transformers.Seq2SeqTrainer.load_generation_config
    """
    given = getattr(args, "generation_config", None)
    kind = type(model).__name__
    can_generate = getattr(model, "can_generate", lambda: callable(getattr(model, "generate", None)))
    if (is_generating(args) or given is not None) and not can_generate():
        name = "predict_with_generate=True" if is_generating(args) else "generation_config"
        raise ModelError(
            f"{name} needs a model that generates, and {kind} cannot. Use a class with a language model "
            "head, such as AutoModelForSeq2SeqLM or AutoModelForCausalLM, or leave the setting out."
        )
    if given is not None and is_first:
        try:
            model.generation_config = Seq2SeqTrainer.load_generation_config(given)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"generation_config={given!r} cannot be used: {error} Pass a GenerationConfig, a dict, or a "
                "folder or file of GenerationConfig.save_pretrained."
            ) from error
    if not is_generating(args):
        return
    if _pad_token_of(model, processing_class) is None:
        raise ModelError(
            f"predict_with_generate=True pads what {kind} generates, and there is no pad token. Set "
            "tokenizer.pad_token and pass processing_class=tokenizer, or set model.config.pad_token_id."
        )
    _check_start(model)
    if saves:
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"The generation_config of {kind} is not valid, so checkpoints cannot be saved: {error} "
                "Correct model.generation_config, or set generation_config."
            ) from error


def _check_start(model: Any) -> None:
    """Check that an encoder-decoder model has a first token for its decoder."""
    config = getattr(model, "generation_config", None)
    if config is None or not getattr(model.config, "is_encoder_decoder", False):
        return
    if config.decoder_start_token_id is None and config.bos_token_id is None:
        raise ModelError(
            f"The generation_config of {type(model).__name__} has neither decoder_start_token_id nor "
            "bos_token_id. The one in the settings replaces the model's: start from "
            "copy.deepcopy(model.generation_config)."
        )


def _pad_token_of(model: Any, processing_class: Any) -> int | None:
    """Return the pad token of generated samples.

    Mirrors: transformers.Seq2SeqTrainer._pad_tensors_to_max_len
    """
    found: int | None
    if processing_class is not None and hasattr(processing_class, "pad_token_id"):
        found = processing_class.pad_token_id
        return processing_class.eos_token_id if found is None else found
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found


@contextmanager
def preserve_generation_config(model: Any) -> Iterator[None]:
    """Undo changes of `generate` to the model's generation config."""
    config = getattr(model, "generation_config", None)
    before = None if config is None else copy.deepcopy(vars(config))
    try:
        yield
    finally:
        if before is not None:
            vars(config).clear()
            vars(config).update(before)


def decode(predictions: Any, processing_class: Any, *, skip_special_tokens: bool = True) -> list[str]:
    """Decode generated token ids, or labels.

    Args:
        predictions: ids as an array or tensor, [samples, length], a list of these, or a `PredictionOutput`.
            Negative ids, such as -100, are padding.
        processing_class: tokenizer or processor.
        skip_special_tokens: leave padding and the like out.

    Returns:
        One text a sample.

    Raises:
        ModelError: `processing_class` does not decode.
        DataError: these are no token ids.

    Proved by: tests/unit/evaluation/test_generation.py
    """
    if not hasattr(processing_class, "batch_decode"):
        raise ModelError(
            f"decode needs a tokenizer or processor, got {processing_class!r}. Pass "
            "processing_class=tokenizer."
        )
    if isinstance(predictions, PredictionOutput):
        predictions = predictions.predictions
    if isinstance(predictions, list) and predictions and np.ndim(predictions[0]) > 1:
        parts = (decode(p, processing_class, skip_special_tokens=skip_special_tokens) for p in predictions)
        return [text for part in parts for text in part]
    ids = np.asarray(predictions.cpu() if isinstance(predictions, Tensor) else predictions)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"Token ids must be integers, [samples, length]; got {ids.dtype} of shape {list(ids.shape)}. Set "
            "predict_with_generate=True, or decode logits.argmax(-1)."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), None)
    if pad is None and (ids < 0).any():
        raise ModelError(
            f"Predictions are padded with {_PADDING}, and the tokenizer has neither pad nor eos token. Set "
            "tokenizer.pad_token."
        )
    ids = np.where(ids < 0, 0 if pad is None else pad, ids)
    texts: list[str] = processing_class.batch_decode(ids, skip_special_tokens=skip_special_tokens)
    return texts
