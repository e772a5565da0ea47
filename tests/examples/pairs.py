"""Which pairs of examples there are, what they read, and what they are judged by."""

from pathlib import Path
from typing import NamedTuple

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


def arguments_of(task: str, folder: Path) -> list[str]:
    """What a script is told of the places of its data and model."""
    options = ("--data", "--model")
    return [
        word
        for name, place in zip(options, PAIRS[task].reads, strict=False)
        for word in (name, str(folder / place))
    ]
