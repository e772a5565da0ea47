"""A training loop written with Accelerate: prepare, accumulate, backward, step; and what takes its place.

In "exact" the scores are equal to the bit: both take the mean over the 64 reviews of a step, and "native" has
four times that gradient. Every step has to be full, since the loop divides a last, shorter one by four, too;
and both have to draw the order of the reviews from the seed, which `use_seedable_sampler` says.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report
from reviews import read

__all__ = ["EPOCHS", "MICRO_BATCHES", "RATE", "SEED", "SIZE", "arguments", "read", "report", "score"]

EPOCHS, SIZE, MICRO_BATCHES, RATE, SEED = 2, 16, 4, 5e-5, 42


def arguments():
    return parse(__doc__)


def score(losses, logits, labels):
    """Mean loss and accuracy of an evaluation: one loss a review; NumPy's mean, as the native Trainer's."""
    is_right = (logits.argmax(-1) == labels).numpy(force=True)
    return {"loss": losses.numpy(force=True).mean().item(), "accuracy": is_right.mean().item()}
