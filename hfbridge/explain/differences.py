"""What the native Trainer does that its settings do not say, with the numbers of a run; pure.

    about                                hfbridge does                    when it is told
    loss and gradient times G x W        "exact": not; "native": the same more than one micro-batch in a step
    clipping at a G x W-th               likewise                         and max_grad_norm
    micro-batches that count alike       likewise                         likewise
    gradients of GPT-2 a little small    likewise                         always
    eval_loss times W                    likewise                         evaluation on several ranks
    FSDP that is not there on CPUs       shards                           fsdp, use_cpu
    a first step at learning rate 0      the same                         warmup
    a short last window that steps       the same                         accumulation
    lengths that ignore data_seed        the same                         group_by_length
    checkpoints that cannot be resumed   the same                         save_only_model

G is gradient_accumulation_steps, W the number of ranks. Which loss a model has is found out when it is there
(model/normalization.py); here the kinds are named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hfbridge.settings import Settings
from hfbridge.settings.schedules import FOLLOWING

_OWN_MEAN = "BERT, RoBERTa, DistilBERT and DeBERTa with most heads, T5, BART, Marian, Whisper, Segformer"
_DIVIDING = "Llama, Qwen, Mistral, ViT"
_ROW_TOKENS = 512  # of the example for models that count a token too many


@dataclass(frozen=True, slots=True)
class Difference:
    """Something about the native Trainer that one should know.

    Attributes:
        about: the settings it comes from.
        text: what the native Trainer does, in numbers, and what hfbridge does.
        is_alike: whether hfbridge does the same.
    """

    about: tuple[str, ...]
    text: str
    is_alike: bool


def differences(
    settings: Settings,
    *,
    ranks: int | None,
    kind: str,
    loss_normalization: Literal["exact", "native"],
) -> Iterator[Difference]:
    """Tell what the native Trainer does that its settings do not say.

    Args:
        settings: of the run.
        ranks: how many there are; `None` if only the machine knows.
        kind: of the strategy.
        loss_normalization: that of the HFModule.

    Yields:
        One thing after the other: first what differs, then what is alike.
    """
    is_alike = loss_normalization == "native"
    yield from _of_the_loss(settings, ranks, is_alike=is_alike)
    if kind in ("fsdp", "fsdp2") and settings.use_cpu:
        yield Difference(
            ("fsdp", "use_cpu"),
            "Natively FSDP is not there on CPUs: the run is plain DDP, without a word. Here weights, "
            "gradients and optimizer state are shared, on CPUs too.",
            is_alike=False,
        )
    yield from _alike(settings)


def _of_the_loss(settings: Settings, ranks: int | None, *, is_alike: bool) -> Iterator[Difference]:
    accumulation = settings.gradient_accumulation_steps
    # Without average_tokens_across_devices the ranks' gradients are averaged as they are.
    times_ranks = ranks if settings.average_tokens_across_devices else 1
    about = ("gradient_accumulation_steps", "average_tokens_across_devices")
    factor = accumulation * times_ranks if times_ranks is not None else None
    here = (
        'Here they are the same: loss_normalization="native"; "exact" has them as of the mean over all items.'
        if is_alike
        else 'Here they are those of the mean over all items: loss_normalization="exact"; "native" has the '
        "factor, to the bit."
    )
    if factor is None or factor > 1:
        yield Difference(
            about,
            f"Natively loss and gradient are {_product(accumulation, times_ranks)} times too large for "
            f"models that ignore num_items_in_batch and return the mean of their own micro-batch "
            f"({_OWN_MEAN}); for those that divide by it ({_DIVIDING}) they are right. {here}",
            is_alike,
        )
    if settings.max_grad_norm > 0 and (factor is None or factor > 1):
        norm = settings.max_grad_norm
        at = f"{norm / accumulation:.4g}/W" if factor is None else f"{norm / factor:.4g}"
        yield Difference(
            ("max_grad_norm", *about),
            f"Natively max_grad_norm={norm:g} clips those models' gradients from a norm of {at} on, since it "
            f"sees the enlarged ones. {'Here too.' if is_alike else f'Here from {norm:g} on.'}",
            is_alike,
        )
    if ranks is None or accumulation * ranks > 1:
        yield Difference(
            about[:1],
            "Natively the micro-batches of a step count alike for models that do not take num_items_in_batch "
            "(ConvNeXt, Gemma 3, extractive question answering), however many labels each has. "
            f"{'Here too.' if is_alike else 'Here each counts by its labels.'}",
            is_alike,
        )
    yield Difference(
        (),
        "Natively the loss of GPT-2, CTRL, XLNet, XLM and Reformer is divided by one token a row too many: "
        f"rows of {_ROW_TOKENS} tokens give {(_ROW_TOKENS - 1) / _ROW_TOKENS:.3f} of the mean. "
        f"{'Here too.' if is_alike else 'Here it is the mean.'}",
        is_alike,
    )
    if settings.eval_strategy != "no" and (times_ranks is None or times_ranks > 1):
        yield Difference(
            ("eval_strategy", "average_tokens_across_devices"),
            f"Natively eval_loss of models that ignore num_items_in_batch is {times_ranks or 'W'} times too "
            f"large on {ranks or 'W'} ranks. {'Here too.' if is_alike else 'Here it is the mean.'}",
            is_alike,
        )


def _product(accumulation: int, ranks: int | None) -> str:
    """Write G x W, and what it is."""
    if ranks is None and accumulation == 1:
        return "W (the number of ranks)"
    if ranks is None:
        return f"G·W = {accumulation}·W (W: the number of ranks)"
    if ranks == 1:
        return f"G = {accumulation}"
    return f"G·W = {accumulation}·{ranks} = {accumulation * ranks}"


def _alike(settings: Settings) -> Iterator[Difference]:
    """Tell what hfbridge does as natively, and is easily overlooked."""
    schedule = settings.lr_scheduler_type
    if settings.warmup_steps > 0 and schedule not in ("constant", *FOLLOWING):
        begins = (
            "begins at one warmup step's share of the learning rate"
            if schedule == "cosine_warmup_with_min_lr"
            else "is made with learning rate 0"
        )
        yield Difference(
            ("warmup_steps", "lr_scheduler_type"),
            f"The first step {begins}; the full rate of {settings.learning_rate:g} comes after "
            f"{_warmup(settings)}.",
            is_alike=True,
        )
    if settings.gradient_accumulation_steps > 1:
        yield Difference(
            ("gradient_accumulation_steps",),
            f"What is left at the end of an epoch, fewer than {settings.gradient_accumulation_steps} "
            "micro-batches, is a step of its own.",
            is_alike=True,
        )
    if settings.train_sampling_strategy == "group_by_length" and settings.data_seed is not None:
        yield Difference(
            ("train_sampling_strategy", "data_seed"),
            "The order is drawn from the global generator: data_seed is not read.",
            is_alike=True,
        )
    if settings.save_only_model and settings.save_strategy != "no":
        yield Difference(
            ("save_only_model",),
            "Checkpoints hold no optimizer, schedule and random states: no run goes on from them exactly.",
            is_alike=True,
        )


def _warmup(settings: Settings) -> str:
    """Say how long the warmup is.

    Mirrors: transformers.TrainingArguments.get_warmup_steps
    """
    said = settings.warmup_steps
    if said >= 1:
        return f"{int(said)} steps"
    if settings.max_steps > 0:
        return f"{math.ceil(settings.max_steps * said)} of {settings.max_steps} steps"
    return f"{said:.4g} of all steps, rounded up"
