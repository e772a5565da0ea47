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

G is gradient_accumulation_steps, W the number of ranks; it is a symbol where only the machine knows it. Which
loss a model has is found out when it is there (model/normalization.py); here the kinds are named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hfbridge.settings import UNDECIDED, Settings
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


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run before it runs.

    Attributes:
        settings: of the run.
        ranks: how many there are; `None` if only the machine knows.
        kind: of the strategy; `None` if it is made when the run begins.
        loss_normalization: that of the HFModule.
    """

    settings: Settings
    ranks: int | None
    kind: str | None
    loss_normalization: Literal["exact", "native"]

    def here(self, *, exact: str, native: str) -> str:
        """Say what hfbridge does, by the normalisation of the loss."""
        return native if self.loss_normalization == "native" else exact


def differences(run: Run) -> Iterator[Difference]:
    """Tell what the native Trainer does that its settings do not say.

    Args:
        run: what is known of it.

    Yields:
        One thing after the other: first what differs, then what is alike.
    """
    yield from _of_the_loss(run)
    if run.kind in ("fsdp", "fsdp2") and run.settings.use_cpu:
        yield Difference(
            ("fsdp", "use_cpu"),
            "Natively FSDP is not there on CPUs: the run is plain DDP, without a word. Here weights, "
            "gradients and optimizer state are shared, on CPUs too.",
            is_alike=False,
        )
    yield from _alike(run)


def _of_the_loss(run: Run) -> Iterator[Difference]:
    is_alike, ranks, factor = run.loss_normalization == "native", run.ranks, _Factor.of(run)
    about = ("gradient_accumulation_steps", "average_tokens_across_devices")
    if factor.may_exceed_one:
        here = run.here(
            exact='Here they are those of the mean over all items: loss_normalization="exact"; "native" has '
            "the factor, to the bit.",
            native='Here they are the same: loss_normalization="native"; "exact" has them as of the mean '
            "over all items.",
        )
        yield Difference(
            about,
            f"Natively loss and gradient are {factor.told} times too large for models that ignore "
            f"num_items_in_batch and return the mean of their own micro-batch ({_OWN_MEAN}); for those that "
            f"divide by it ({_DIVIDING}) they are right. {here}",
            is_alike,
        )
    if factor.may_exceed_one and run.settings.max_grad_norm > 0:
        yield Difference(("max_grad_norm", *about), _clipping(run, factor), is_alike)
    if ranks is None or factor.accumulation * ranks > 1:
        yield Difference(
            about[:1],
            "Natively the micro-batches of a step count alike for models that do not take num_items_in_batch "
            "(ConvNeXt, Gemma 3, extractive question answering), however many labels each has. "
            + run.here(exact="Here each counts by its labels.", native="Here too."),
            is_alike,
        )
    yield Difference(
        (),
        "Natively the loss of GPT-2, CTRL, XLNet, XLM and Reformer is divided by one token a row too many: "
        f"rows of {_ROW_TOKENS} tokens give {(_ROW_TOKENS - 1) / _ROW_TOKENS:.3f} of the mean. "
        + run.here(exact="Here it is the mean.", native="Here too."),
        is_alike,
    )
    if run.settings.eval_strategy != "no" and (factor.ranks is None or factor.ranks > 1):
        times = f"W times too large (W: the number of ranks; {UNDECIDED})"
        yield Difference(
            ("eval_strategy", "average_tokens_across_devices"),
            "Natively eval_loss of models that ignore num_items_in_batch is "
            + (times if factor.ranks is None else f"{factor.ranks} times too large on {ranks} ranks")
            + f". {run.here(exact='Here it is the mean.', native='Here too.')}",
            is_alike,
        )


@dataclass(frozen=True, slots=True)
class _Factor:
    """How many times too large the gradient of a step is natively: G x W.

    Attributes:
        accumulation: G.
        ranks: W, or 1 where ranks are averaged as they are; `None` if only the machine knows.
    """

    accumulation: int
    ranks: int | None

    @classmethod
    def of(cls, run: Run) -> "_Factor":
        """Read it from what is known."""
        # Without average_tokens_across_devices the ranks' gradients are averaged as they are.
        ranks = run.ranks if run.settings.average_tokens_across_devices else 1
        return cls(run.settings.gradient_accumulation_steps, ranks)

    @property
    def value(self) -> int | None:
        """The number, if it is known."""
        return None if self.ranks is None else self.accumulation * self.ranks

    @property
    def may_exceed_one(self) -> bool:
        """Whether there is anything to tell."""
        return self.value is None or self.value > 1

    @property
    def told(self) -> str:
        """Write the product, and what it is."""
        if self.ranks is None:
            product = "W" if self.accumulation == 1 else f"G·W = {self.accumulation}·W"
            meaning = f"the number of ranks; {UNDECIDED}"
            return f"{product} ({meaning})" if self.accumulation == 1 else f"{product} (W: {meaning})"
        if self.ranks == 1:
            return f"G = {self.accumulation}"
        return f"G·W = {self.accumulation}·{self.ranks} = {self.value}"


def _clipping(run: Run, factor: _Factor) -> str:
    """Say from which norm on gradients are clipped, natively and here."""
    norm = run.settings.max_grad_norm
    at = f"{norm / factor.accumulation:.4g}/W" if factor.value is None else f"{norm / factor.value:.4g}"
    return (
        f"Natively max_grad_norm={norm:g} clips those models' gradients from a norm of {at} on, since it "
        f"sees the enlarged ones. {run.here(exact=f'Here from {norm:g} on.', native='Here too.')}"
    )


def _alike(run: Run) -> Iterator[Difference]:
    """Tell what hfbridge does as natively, and is easily overlooked."""
    settings = run.settings
    yield from _of_the_warmup(run)
    accumulation = settings.gradient_accumulation_steps
    if accumulation > 1:
        yield Difference(
            ("gradient_accumulation_steps",),
            f"What is left at the end of an epoch, fewer than {accumulation} micro-batches, is a step of its "
            "own.",
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


def _of_the_warmup(run: Run) -> Iterator[Difference]:
    settings, schedule = run.settings, run.settings.lr_scheduler_type
    if settings.warmup_steps == 0 or schedule in ("constant", *FOLLOWING):
        return
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


def _warmup(settings: Settings) -> str:
    """Say how long the warmup is.

    Mirrors: transformers.TrainingArguments.get_warmup_steps
    """
    said, steps = settings.warmup_steps, settings.max_steps
    if said >= 1:
        return f"{int(said)} steps"
    if steps > 0:
        return f"{math.ceil(steps * said)} of {steps} steps"
    return f"{said:.4g} of all steps, rounded up"
