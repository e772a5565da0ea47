"""Short English sentences and their German translations (Tatoeba): a small new BART, judged by BLEU."""

import csv
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "SIZES", "Bleu", "arguments", "read", "report", "train_tokenizer"]

FILES = ("deu.txt",)
EXPECTED = (
    "deu.txt: a first line to skip, then lines of an English sentence, a tab and its German translation. "
    "https://www.manythings.org/anki has such pairs of Tatoeba (deu-eng.zip; leave out its third column)."
)
SETTINGS = {
    "output_dir": "out/tatoeba",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "predict_with_generate": True,
    "generation_max_length": 24,
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "seed": 42,
}
SIZES = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 1,
}


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def read(given):
    """Read the pairs, "en" and "de"; no English sentence of the test is one that is trained on."""
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "skiprows": 1, "column_names": ["en", "de"]}
    rows = load_dataset("csv", data_files=str(given.data / FILES[0]), split="train", **form)
    train, test = (200, 24) if given.tiny else (24_000, 300)
    parts = rows.shuffle(seed=42).select(range(2 * train)).train_test_split(test_size=test, seed=42)
    tested = set(parts["test"]["en"])
    parts["train"] = parts["train"].filter(lambda row: row["en"] not in tested)
    parts["train"] = parts["train"].select(range(min(train, len(parts["train"]))))
    return parts


def train_tokenizer(rows):
    """Make a byte-pair tokenizer of both languages, with the special tokens that the model is told of."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*rows["en"], *rows["de"]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class Bleu:
    """BLEU of generated translations."""

    def __init__(self, tokenizer):
        self.tokenizer, self.metric = tokenizer, load_metric("sacrebleu")

    def texts(self, ids):
        ids = np.where(ids == -100, self.tokenizer.pad_token_id, ids)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def __call__(self, result):
        predictions, references = self.texts(result.predictions), self.texts(result.label_ids)
        return {"bleu": self.metric.compute(predictions=predictions, references=references)["score"]}
