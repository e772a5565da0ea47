"""Answers marked in paragraphs (XQuAD, English): extractive question answering, exact match and F1."""

import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from hfbridge import load_metric

sys.path.append(str(Path(__file__).parents[1]))
from command import parse, report

__all__ = ["SETTINGS", "Answers", "arguments", "encode_with_answers", "read", "report"]

FILES = ("xquad.en.json",)
EXPECTED = (
    "xquad.en.json: questions in the format of SQuAD 1.1. The repository google-deepmind/xquad on GitHub has "
    "it; a file of SQuAD 1.1 under this name does as well."
)
SETTINGS = {
    "output_dir": "out/xquad",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 3e-4,
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
}
LENGTH, STRIDE = 192, 64  # tokens of a window over a paragraph, and those that it shares with the next one
LONGEST, CANDIDATES = 30, 20  # tokens of an answer; starts and ends that are looked at in each window


def arguments():
    return parse(__doc__, files=FILES, expected=EXPECTED)


def read(given):
    """Read the questions; those of the last articles are for the test."""
    rows = []
    for article in json.loads((given.data / FILES[0]).read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                texts = [answer["text"] for answer in question["answers"]]
                starts = [answer["answer_start"] for answer in question["answers"]]
                answers = {"text": texts, "answer_start": starts}
                found = {"id": question["id"], "question": question["question"]}
                rows.append({**found, "context": paragraph["context"], "answers": answers})
    first, last = (10, 6) if given.tiny else (400, 120)
    return DatasetDict(train=Dataset.from_list(rows[:first]), test=Dataset.from_list(rows[-last:]))


def encode(tokenizer, rows):
    """Encode questions with their paragraphs, which may take several windows each."""
    questions = [question.strip() for question in rows["question"]]
    places = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    lengths = {"truncation": "only_second", "max_length": LENGTH, "stride": STRIDE}
    return tokenizer(questions, rows["context"], **lengths, **places)


def encode_with_answers(tokenizer, rows):
    """Encode, and tell each window the first and last token of its answer; the first one if it holds none."""
    encoded = encode(tokenizer, rows)
    rows_of, places = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    firsts, lasts = [], []
    for window, row in enumerate(rows_of):
        answer = rows["answers"][row]
        begin = answer["answer_start"][0]
        end = begin + len(answer["text"][0])
        tokens = [i for i, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        inside = [i for i in tokens if places[window][i][1] > begin and places[window][i][0] < end]
        is_whole = places[window][tokens[0]][0] <= begin and end <= places[window][tokens[-1]][1]
        firsts.append(inside[0] if inside and is_whole else 0)
        lasts.append(inside[-1] if inside and is_whole else 0)
    return {**encoded, "start_positions": firsts, "end_positions": lasts}


class Answers:
    """Exact match and F1 of the answers that logits of all windows stand for."""

    def __init__(self, rows, tokenizer):
        self.rows, self.metric = rows.to_list(), load_metric("squad")
        encoded = encode(tokenizer, rows[:])
        self.rows_of, places = encoded["overflow_to_sample_mapping"], encoded["offset_mapping"]
        self.places = [
            [
                place if part == 1 else None
                for place, part in zip(of_window, encoded.sequence_ids(window), strict=True)
            ]
            for window, of_window in enumerate(places)
        ]

    def __call__(self, result):
        best = {row: (-np.inf, "") for row in range(len(self.rows))}
        for row, places, starts, ends in zip(self.rows_of, self.places, *result.predictions, strict=True):
            for first in np.argsort(-starts, kind="stable")[:CANDIDATES]:
                for last in np.argsort(-ends, kind="stable")[:CANDIDATES]:
                    if (
                        not first <= last < min(first + LONGEST, len(places))
                        or not places[first]
                        or not places[last]
                    ):
                        continue
                    score = starts[first] + ends[last]
                    if score > best[row][0]:
                        best[row] = score, self.rows[row]["context"][places[first][0] : places[last][1]]
        texts = zip((row["id"] for row in self.rows), best.values(), strict=True)
        predictions = [{"id": name, "prediction_text": text} for name, (_, text) in texts]
        references = [{"id": row["id"], "answers": row["answers"]} for row in self.rows]
        return self.metric.compute(predictions=predictions, references=references)
