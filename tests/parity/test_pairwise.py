"""A pairwise covering of the settings: every two values of two settings meet in one run of both engines.

Grade: exact. The runs are chosen by allpairspy; how many pairs they cover is counted and held.
"""

from itertools import combinations
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

from tests.parity.engines import Job, run_both

COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.2}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
STEPWISE = {"eval_strategy": "steps", "eval_steps": 2}


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss function of the user's."""
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


# setting, or what belongs to it -> what a run says of it, by a short name
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "model": {"distilbert": {}, "llama": {}, "bert-token": {}, "gpt2": {}},
    "accumulation": {str(n): {"gradient_accumulation_steps": n} for n in (1, 3, 4)},
    "length": {
        "epochs": {"num_train_epochs": 2},
        "part": {"num_train_epochs": 1.5},
        "steps": {"max_steps": 5},
    },
    "optimizer": {
        "adamw": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
        "adafactor": {"optim": "adafactor"},
        "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
        "schedule-free": {"optim": "schedule_free_adamw"},
    },
    "schedule": {
        "linear": {},
        "cosine": COSINE,
        "constant": {"lr_scheduler_type": "constant"},
        "plateau": PLATEAU,
    },
    "clipping": {
        "1": {"max_grad_norm": 1.0},
        "none": {"max_grad_norm": 0.0},
        "hard": {"max_grad_norm": 0.05},
    },
    "loss": {"own": {}, "smoothed": {"label_smoothing_factor": 0.1}, "function": {}},
    "noise": {"no": {}, "yes": {"neftune_noise_alpha": 5.0}},
    "recomputation": {"no": {}, "yes": {"activation_checkpointing": True}},
    "precision": {"fp32": {}, "bf16": {"bf16": True}},
    "logging": {
        "each": {"logging_steps": 1},
        "some": {"logging_steps": 3, "logging_first_step": True},
        "epoch": {"logging_strategy": "epoch"},
    },
    "evaluation": {
        "no": {},
        "steps": STEPWISE,
        "epoch": {"eval_strategy": "epoch"},
        "start": {**STEPWISE, "eval_on_start": True},
        "late": {**STEPWISE, "eval_delay": 3},
    },
    "best": {"no": {}, "loss": {"metric_for_best_model": "loss"}},
    "collection": {
        "joined": {},
        "by batch": {"eval_accumulation_steps": 1},
        "losses": {"prediction_loss_only": True},
        "with losses": {"include_for_metrics": ["loss"]},
    },
    "order": {
        "random": {},
        "data seed": {"data_seed": 11},
        "sequential": {"train_sampling_strategy": "sequential"},
        "length": {"train_sampling_strategy": "group_by_length"},
        "rebalanced": {"train_sampling_strategy": "batch_rebalance"},
    },
    "last batch": {"kept": {}, "dropped": {"dataloader_drop_last": True}},
    "tokens": {"no": {}, "counted": {"include_num_input_tokens_seen": "all"}},
    "cache": {"kept": {}, "emptied": {"torch_empty_cache_steps": 2, "use_cache": True}},
    "seed": {"42": {}, "7": {"seed": 7}},
}
# Two values that settings refuse together, or that have no meaning together.
APART = {
    (("schedule", "plateau"), ("evaluation", "no")),
    (("schedule", "plateau"), ("best", "no")),
    (("evaluation", "no"), ("best", "loss")),
    (("model", "gpt2"), ("loss", "function")),
    (("model", "llama"), ("loss", "function")),
    (("model", "bert-token"), ("loss", "function")),
}


def is_possible(values: list[str]) -> bool:
    """Tell whether the values of the first factors go together."""
    chosen = set(zip(FACTORS, values, strict=False))
    return not any(one in chosen and other in chosen for one, other in APART)


def pairs_of(run: tuple[str, ...]) -> set[Any]:
    return set(combinations(zip(FACTORS, run, strict=True), 2))


def possible_pairs() -> set[Any]:
    named = [[(factor, value) for value in values] for factor, values in FACTORS.items()]
    return {(a, b) for one, other in combinations(named, 2) for a in one for b in other} - APART


def complete(pair: Any, missing: set[Any]) -> tuple[str, ...]:
    """Make a run of one pair, and of as many missing ones as go with it."""
    run = dict(pair)
    for factor, values in FACTORS.items():
        if factor not in run:
            apart = {b for a in run.items() for p in APART if a in p for b in p}
            free = [value for value in values if (factor, value) not in apart]
            run[factor] = max(
                free, key=lambda value: sum({a, (factor, value)} in map(set, missing) for a in run.items())
            )
    return tuple(run[factor] for factor in FACTORS)


def choose_runs() -> list[tuple[str, ...]]:
    """Let allpairspy choose; what its filter has made it give up is added."""
    runs = [tuple(run) for run in AllPairs([list(v) for v in FACTORS.values()], filter_func=is_possible)]
    missing = possible_pairs().difference(*map(pairs_of, runs))
    while missing:
        runs.append(complete(min(missing), missing))
        missing -= pairs_of(runs[-1])
    return runs


RUNS = choose_runs()


def test_every_pair_that_is_possible_is_covered() -> None:
    covered = set().union(*map(pairs_of, RUNS))
    assert covered == possible_pairs()
    assert len(covered) == 1523
    assert len(RUNS) < 60
    assert all(is_possible(list(run)) for run in RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(run).replace(" ", "_"))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_both_engines_agree(run: tuple[str, ...]) -> None:
    chosen = dict(zip(FACTORS, run, strict=True))
    settings: dict[str, Any] = {}
    for factor, value in chosen.items():
        settings |= FACTORS[factor][value]
    function = own_loss if chosen["loss"] == "function" else None
    more: dict[str, Any] = {}
    if chosen["collection"] == "losses":
        more["compute_metrics"] = None
    run_both(Job(chosen["model"], settings, rows=34, compute_loss_func=function, **more))
