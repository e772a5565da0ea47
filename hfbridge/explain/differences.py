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

G is gradient_accumulation_steps, W the number of ranks. What follows from a setting that nobody knows yet, as
in a script that is only read, is told without a number. Which loss a model has is found out when it is there
(model/normalization.py); here the kinds are named.
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
        settings: some of which may be undecided.
        ranks: how many there are; `None` if nobody knows yet.
        kind: of the strategy; `None` if nobody knows yet.
        loss_normalization: that of the HFModule; `None` if nobody knows yet.
    """

    settings: Settings
    ranks: int | None
    kind: str | None
    loss_normalization: Literal["exact", "native"] | None

    def waits_for(self, *names: str) -> bool:
        """Whether one of these settings is undecided."""
        return not self.settings.undecided.isdisjoint(names)

    def here(self, *, exact: str, native: str) -> str:
        """Say what hfbridge does, by the normalisation of the loss, or in both cases."""
        if self.loss_normalization is None:
            if_exact, if_native = (f"{text[0].lower()}{text[1:]}" for text in (exact, native))
            return f'loss_normalization is {UNDECIDED}. With "exact", {if_exact} With "native", {if_native}'
        return native if self.loss_normalization == "native" else exact


def differences(run: Run) -> Iterator[Difference]:
    """Tell what the native Trainer does that its settings do not say.

    What follows from a setting that is undecided is told by the setting's name, without a number.

    Args:
        run: what is known of it.

    Yields:
        One thing after the other: first what differs, then what is alike.
    """
    yield from _of_the_loss(run)
    if run.kind in ("fsdp", "fsdp2") and (run.settings.use_cpu or run.waits_for("use_cpu")):
        on_cpus = f"With use_cpu ({UNDECIDED}), natively" if run.waits_for("use_cpu") else "Natively"
        yield Difference(
            ("fsdp", "use_cpu"),
            f"{on_cpus} FSDP is not there on CPUs: the run is plain DDP, without a word. Here weights, "
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
    if factor.may_exceed_one and (run.waits_for("max_grad_norm") or run.settings.max_grad_norm > 0):
        yield Difference(("max_grad_norm", *about), _clipping(run, factor), is_alike)
    if factor.accumulation is None or ranks is None or factor.accumulation * ranks > 1:
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
    evaluates = run.waits_for("eval_strategy") or run.settings.eval_strategy != "no"
    if evaluates and (factor.ranks is None or factor.ranks > 1):
        times = f"W times too large (W: {factor.meaning}; {UNDECIDED})"
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
        accumulation: G; `None` if undecided.
        ranks: W, or 1 where ranks are averaged as they are; `None` if nobody knows yet.
        meaning: what W is, where nobody knows it yet.
    """

    accumulation: int | None
    ranks: int | None
    meaning: str = "the number of ranks"

    @classmethod
    def of(cls, run: Run) -> "_Factor":
        """Read it from what is known."""
        is_open = run.waits_for("gradient_accumulation_steps")
        accumulation = None if is_open else run.settings.gradient_accumulation_steps
        # Without average_tokens_across_devices the ranks' gradients are averaged as they are.
        if not run.waits_for("average_tokens_across_devices"):
            return cls(accumulation, run.ranks if run.settings.average_tokens_across_devices else 1)
        if run.ranks == 1:
            return cls(accumulation, 1)
        return cls(
            accumulation,
            None,
            f"{run.ranks or 'the number of ranks'} with average_tokens_across_devices, 1 without it",
        )

    @property
    def value(self) -> int | None:
        """The number, if it is known."""
        if self.accumulation is None or self.ranks is None:
            return None
        return self.accumulation * self.ranks

    @property
    def may_exceed_one(self) -> bool:
        """Whether there is anything to tell."""
        return self.value is None or self.value > 1

    @property
    def symbols(self) -> str:
        """Write it as a product, without the factors that are 1."""
        parts = [
            symbol if number is None else str(number)
            for symbol, number in (("G", self.accumulation), ("W", self.ranks))
            if number != 1
        ]
        return "·".join(parts)

    @property
    def told(self) -> str:
        """Write the product, and what it is."""
        if self.value is not None:
            is_product = self.ranks != 1
            return (
                f"G·W = {self.accumulation}·{self.ranks} = {self.value}"
                if is_product
                else f"G = {self.value}"
            )
        if self.symbols == "W":
            return f"W ({self.meaning}; {UNDECIDED})"
        names = ["G: gradient_accumulation_steps"] if self.accumulation is None else []
        names += [f"W: {self.meaning}"] if self.ranks is None else []
        head = "G·W = " if self.accumulation is not None else ""
        return f"{head}{self.symbols} ({'; '.join((*names, UNDECIDED))})"


def _clipping(run: Run, factor: _Factor) -> str:
    """Say from which norm on gradients are clipped, natively and here."""
    norm = None if run.waits_for("max_grad_norm") else run.settings.max_grad_norm
    said = "max_grad_norm" if norm is None else f"max_grad_norm={norm:g}"
    at = f"{'max_grad_norm' if norm is None else f'{norm:g}'}/({factor.symbols})"
    if norm is not None and factor.value is not None:
        at = f"{norm / factor.value:.4g}"
    elif norm is not None and factor.accumulation is not None:
        at = f"{norm / factor.accumulation:.4g}/W"
    from_there = "max_grad_norm" if norm is None else f"{norm:g}"
    is_open = f" ({UNDECIDED})" if norm is None else ""
    return (
        f"Natively {said}{is_open} clips those models' gradients from a norm of {at} on, since it sees the "
        f"enlarged ones. {run.here(exact=f'Here from {from_there} on.', native='Here too.')}"
    )


def _alike(run: Run) -> Iterator[Difference]:
    """Tell what hfbridge does as natively, and is easily overlooked."""
    settings = run.settings
    yield from _of_the_warmup(run)
    accumulation = settings.gradient_accumulation_steps
    is_open = run.waits_for("gradient_accumulation_steps")
    if is_open or accumulation > 1:
        count = f"gradient_accumulation_steps ({UNDECIDED})" if is_open else str(accumulation)
        yield Difference(
            ("gradient_accumulation_steps",),
            f"What is left at the end of an epoch, fewer than {count} micro-batches, is a step of its own.",
            is_alike=True,
        )
    if settings.train_sampling_strategy == "group_by_length" and (
        settings.data_seed is not None or run.waits_for("data_seed")
    ):
        yield Difference(
            ("train_sampling_strategy", "data_seed"),
            "The order is drawn from the global generator: data_seed is not read.",
            is_alike=True,
        )
    if settings.save_only_model and (run.waits_for("save_strategy") or settings.save_strategy != "no"):
        saved = "Checkpoints"
        if run.waits_for("save_strategy"):
            saved = f"Checkpoints, if there are any (save_strategy: {UNDECIDED}),"
        yield Difference(
            ("save_only_model",),
            f"{saved} hold no optimizer, schedule and random states: no run goes on from them exactly.",
            is_alike=True,
        )


def _of_the_warmup(run: Run) -> Iterator[Difference]:
    settings, schedule = run.settings, run.settings.lr_scheduler_type
    conditions = []
    if run.waits_for("warmup_steps"):
        conditions.append(f"with a warmup (warmup_steps: {UNDECIDED})")
    elif settings.warmup_steps == 0:
        return
    if run.waits_for("lr_scheduler_type"):
        conditions.append(f"with a schedule that warms up (lr_scheduler_type: {UNDECIDED})")
    elif schedule in ("constant", *FOLLOWING):
        return
    begins = (
        "begins at one warmup step's share of the learning rate"
        if schedule == "cosine_warmup_with_min_lr"
        else "is made with learning rate 0"
    )
    is_open = run.waits_for("learning_rate")
    rate = f"learning_rate ({UNDECIDED})" if is_open else f"{settings.learning_rate:g}"
    head = " and ".join(conditions)
    text = f"{head[0].upper()}{head[1:]} the first step" if head else "The first step"
    yield Difference(
        ("warmup_steps", "lr_scheduler_type"),
        f"{text} {begins}; the full rate of {rate} comes after {_warmup(run)}.",
        is_alike=True,
    )


def _warmup(run: Run) -> str:
    """Say how long the warmup is.

    Mirrors: transformers.TrainingArguments.get_warmup_steps
    """
    said, steps = run.settings.warmup_steps, run.settings.max_steps
    if run.waits_for("warmup_steps"):
        return "it"
    if said >= 1:
        return f"{int(said)} steps"
    if steps > 0 and not run.waits_for("max_steps"):
        return f"{math.ceil(steps * said)} of {steps} steps"
    return f"{said:.4g} of all steps, rounded up"
