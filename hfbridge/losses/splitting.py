"""Whether a loss is a mean over items at all, which "exact" needs; asked of the model, knows Hugging Face.

a loss over                                      the loss of a batch is the mean of those of its parts
rows, labels, masked patches                     yes, weighted by what they count
rows compared with each other (contrastive)      no
objects matched to queries (detection)           no
sums of means over different items               no
"""

from torch import nn
from transformers.trainer_utils import unwrap_peft_model

from hfbridge.losses.step_loss import ExactLoss
from hfbridge.models.probing import Inputs, asking, noise_of


def matches_objects(inputs: Inputs) -> bool:
    """Whether rows have objects of their own, with losses divided by the number of objects in a batch."""
    return "class_labels" in inputs or isinstance(inputs.get("labels"), (list, tuple))


def describe_split(
    model: nn.Module, inputs: Inputs, parts: tuple[Inputs, Inputs] | None, loss: ExactLoss
) -> str:
    """Say that the loss of a micro-batch is not the mean of those of its halves; empty if it is.

    Objects that are matched are known by their labels. Other losses are computed: whole and in halves.

    Args:
        model: the Hugging Face model on its device.
        inputs: the micro-batch.
        parts: its halves; `None` if it cannot be cut.
        loss: how the run counts and divides.
    """
    whose = _name_of(model, loss)
    if loss.criterion.function is None and matches_objects(inputs):
        return _note(whose, "it is divided by the number of objects in the batch")
    if parts is None:
        return ""
    try:
        with asking(model):
            whole, again, *cut = (
                (float(value), held)
                for value, _, held in (loss.evaluate(model, given) for given in (inputs, inputs, *parts))
            )
    except Exception:  # if not for the size of the batch, it is raised again in training
        return ""
    items = sum(held for _, held in cut)
    if not items or whole != again:  # a forward that draws in eval mode cannot be compared
        return ""
    mean = sum(value * held for value, held in cut) / items
    distance = abs(mean - whole[0]) / max(abs(whole[0]), 1e-12)
    if not distance > noise_of(model):
        return ""
    return _note(whose, f"here they differ by {distance:.2g} of it")


def _name_of(model: nn.Module, loss: ExactLoss) -> str:
    if loss.criterion.function is None:
        return type(unwrap_peft_model(model)).__name__
    return f"compute_loss_func ({loss.criterion.function_name})"


def _note(whose: str, how: str) -> str:
    return (
        f"The loss of {whose} over a batch is not the mean of the losses of its parts; {how}. It compares "
        "rows with each other, matches objects, or adds means over different items, so that the gradient "
        'depends on the cut into micro-batches also in "exact". Where that matters, use one micro-batch: '
        "gradient_accumulation_steps=1 with a larger per_device_train_batch_size."
    )
