"""Evaluation by generating (`predict_with_generate`), and the texts that come of it; knows Hugging Face.

setting                    what becomes of it
generation_config          takes the place of model.generation_config when the model is made ready
generation_max_length      max_length of each `generate`, unless a call gives max_length or max_new_tokens
generation_num_beams       num_beams of each `generate`, unless a call gives it

In "native" a batch is predicted, gathered and averaged as by `transformers.Seq2SeqTrainer`: its loss is the
model's own whatever `compute_loss_func` says, smoothed labels are not shifted, and the rows that fill up the
last round are not cut off. In "exact" loss and rows are those of any other evaluation.

A decoder alone (GPT-2, Llama) continues its `input_ids`, and predictions begin with them. So evaluation rows
are prompts without their answers, padded on the left; `labels`, of the same length, give the loss only.
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


def generates(args: TrainingArguments) -> bool:
    """Tell whether evaluations generate; only `Seq2SeqTrainingArguments` say so."""
    return bool(getattr(args, "predict_with_generate", False))


@dataclass(frozen=True)
class Generation:
    """How evaluations generate.

    Attributes:
        arguments: of `generate`.
        processing_class: tokenizer or processor, whose pad token fills rows up; `None` for the model's.
        weight_by_sample: the loss is the native one.
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
        """Complete what a call gives by the settings.

        Args:
            args: the settings, `Seq2SeqTrainingArguments`.
            given: arguments of `generate` that win over them.
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

        On several ranks that hold parts of the weights only, all generate until the last one is done.

        Args:
            model: the Hugging Face model, in eval mode.
            batch: inputs and labels, on the model's device.
            loss_of: computes loss, outputs and items of a batch, in "exact".

        Returns:
            The token ids as logits, [batch, length], padded as natively.

        Raises:
            DataError: the prompts leave no room below the maximum length.

        Mirrors: transformers.Seq2SeqTrainer.prediction_step
        """
        weight = 0

        def exactly(**inputs: Any) -> dict[str, Any]:
            nonlocal weight
            loss, _, weight = loss_of(model, inputs)
            return {"loss": loss}

        smoother = LabelSmoother(epsilon=self.smoothing) if self.weight_by_sample and self.smoothing else None
        asked: Any = _StandIn(model, self.processing_class, smoother, dict(self.arguments))
        try:
            called: Any = model if self.weight_by_sample else exactly
            found: Any = Seq2SeqTrainer.prediction_step(
                asked, called, dict(batch), prediction_loss_only=False
            )
        except ValueError as error:
            if not str(error).startswith("Input length of"):
                raise
            raise DataError(
                f"Nothing can be generated: {str(error).partition('. This')[0]}. A decoder counts its prompt "
                "in max_length: raise generation_max_length above the longest prompt, or leave it out and "
                "pass generation_config=GenerationConfig(max_new_tokens=...)."
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
    """What `Seq2SeqTrainer.prediction_step` asks of its Trainer.

    It is called as a function rather than written again; the names it looks up are pinned by
    tests/unit/evaluation/test_generation.py.
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


def make_ready(model: Any, args: Any, *, processing_class: Any, is_first: bool, saves: bool) -> None:
    """Give a model the settings' `generation_config`, and see that evaluations can generate.

    Args:
        model: the Hugging Face model.
        args: the settings.
        processing_class: tokenizer or processor, or `None`.
        is_first: nothing has been run with the model; natively it is given its configuration once.
        saves: the run writes checkpoints.

    Raises:
        SettingsError: `generation_config` cannot be read, or is not valid.
        ModelError: the model cannot generate, there is no pad token, or its own configuration could not be
            saved.

    Mirrors: transformers.Seq2SeqTrainer.load_generation_config
    """
    given = getattr(args, "generation_config", None)
    kind = type(model).__name__
    can_generate = getattr(model, "can_generate", lambda: callable(getattr(model, "generate", None)))
    if (generates(args) or given is not None) and not can_generate():
        name = "predict_with_generate=True" if generates(args) else "generation_config"
        raise ModelError(
            f"{name} asks for a model that generates, and {kind} cannot. Use a class with a language model "
            "head, such as AutoModelForSeq2SeqLM or AutoModelForCausalLM, or leave the setting out."
        )
    if given is not None and is_first:
        try:
            model.generation_config = Seq2SeqTrainer.load_generation_config(given)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"generation_config={given!r} cannot be used: {error} Give a GenerationConfig, a dictionary, "
                "or a folder or file that GenerationConfig.save_pretrained has written."
            ) from error
    if not generates(args):
        return
    if _pad_token_of(model, processing_class) is None:
        raise ModelError(
            f"predict_with_generate=True pads what {kind} generates, and there is no pad token. Set "
            "tokenizer.pad_token and pass processing_class=tokenizer, or set "
            "model.config.pad_token_id."
        )
    _check_start(model)
    if saves:
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"The generation_config of {kind} is not valid, and checkpoints could not be saved after an "
                f"evaluation: {error} Correct model.generation_config, or pass generation_config= in the "
                "settings."
            ) from error


def _check_start(model: Any) -> None:
    """See that a decoder which has an encoder knows what to begin with."""
    config = getattr(model, "generation_config", None)
    if config is None or not getattr(model.config, "is_encoder_decoder", False):
        return
    if config.decoder_start_token_id is None and config.bos_token_id is None:
        raise ModelError(
            f"The generation_config of {type(model).__name__} has neither decoder_start_token_id nor "
            "bos_token_id. One in the settings takes the place of the model's as a whole: begin with "
            "copy.deepcopy(model.generation_config), and change what you like."
        )


def _pad_token_of(model: Any, processing_class: Any) -> int | None:
    """Find what fills generated rows up.

    Mirrors: transformers.Seq2SeqTrainer._pad_tensors_to_max_len
    """
    found: int | None
    if processing_class is not None and hasattr(processing_class, "pad_token_id"):
        found = processing_class.pad_token_id
        return processing_class.eos_token_id if found is None else found
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found


@contextmanager
def keeping_config(model: Any) -> Iterator[None]:
    """Generate, and have the model's generation config, which that completes, as it was."""
    config = getattr(model, "generation_config", None)
    before = None if config is None else copy.deepcopy(vars(config))
    try:
        yield
    finally:
        if before is not None:
            vars(config).clear()
            vars(config).update(before)


def decode(predictions: Any, processing_class: Any, *, skip_special_tokens: bool = True) -> list[str]:
    """Make texts of generated token ids, or of labels.

    Args:
        predictions: what `Trainer.predict_dataset`, `Trainer.predict` or an `EvalPrediction` holds: ids as an
            array or tensor, [rows, length], or a list of these, or a whole `PredictionOutput`. Ids below 0,
            such as the -100 that fills arrays up, count as padding.
        processing_class: tokenizer or processor.
        skip_special_tokens: leave padding and the like out of the texts.

    Returns:
        One text a row.

    Raises:
        ModelError: `processing_class` does not decode.
        DataError: these are no token ids.

    Proved by: tests/unit/evaluation/test_generation.py
    """
    if not hasattr(processing_class, "batch_decode"):
        raise ModelError(
            f"Texts are made by a tokenizer or processor, and processing_class is {processing_class!r}. Pass "
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
            f"Token ids are whole numbers, [rows, length]; these are {ids.dtype} of shape {list(ids.shape)}. "
            "Set predict_with_generate=True to have evaluations and predictions generate; of logits take "
            "logits.argmax(-1)."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), None)
    if pad is None and (ids < 0).any():
        raise ModelError(
            f"Rows are filled up with {_PADDING}, which stands for padding, and the tokenizer has neither "
            "pad nor eos token. Set tokenizer.pad_token."
        )
    ids = np.where(ids < 0, 0 if pad is None else pad, ids)
    texts: list[str] = processing_class.batch_decode(ids, skip_special_tokens=skip_special_tokens)
    return texts
