"""Processors of images and sounds as processing_class: they make rows, and are saved, as natively.

Grade: exact, one process, fp32, CPU. Processors are made from their arguments; images and sounds are random.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers as hf

from tests.auto_models import TABLE as MODELS
from tests.parity.engines import Job, assert_identical, run_ours, run_theirs
from tests.tiny import make_tokenizer

RATE = 16_000


def image_processor() -> Any:
    """Of the backend that needs Pillow alone; with torchvision ViTImageProcessor is another class."""
    return hf.ViTImageProcessorPil(size={"height": 32, "width": 32})


def clip_processor() -> Any:
    images = hf.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=False
    )
    return hf.CLIPProcessor(images, make_tokenizer())


def images(count: int) -> list[Any]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, 255, (40, 36, 3), dtype=np.uint8).tolist() for _ in range(count)]


def sounds(count: int) -> list[list[float]]:
    draw = np.random.default_rng(3)
    return [draw.standard_normal(int(draw.integers(300, 500))).tolist() for _ in range(count)]


def labelled(name: str, values: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: values, "label": [i % 3 for i in range(len(values))]})


def arrays(values: list[Any]) -> list[Any]:
    return [np.asarray(value, dtype=np.uint8) for value in values]


def of_images(rows: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        "pixel_values": image_processor()(arrays(rows["image"]))["pixel_values"],
        "labels": rows["label"],
    }


def of_sounds(rows: dict[str, list[Any]]) -> dict[str, Any]:
    return {**hf.Wav2Vec2FeatureExtractor()(rows["sound"], sampling_rate=RATE), "labels": rows["label"]}


def of_speech(rows: dict[str, list[Any]]) -> dict[str, Any]:
    found = whisper_extractor()([np.array(s) for s in rows["sound"]], sampling_rate=RATE)["input_features"]
    return {
        "input_features": [mel[:, :20] for mel in found],
        "labels": [[5, 6, 7 + i] for i in rows["label"]],
    }


def of_pairs(rows: dict[str, list[Any]]) -> dict[str, Any]:
    words = [f"w{3 + i} w9 w1{i}" for i in rows["label"]]
    return {**clip_processor()(text=words, images=arrays(rows["image"])), "return_loss": [True] * len(words)}


def whisper_extractor() -> Any:
    return hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def with_loss(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **hf.default_data_collator([{k: v for k, v in r.items() if k != "return_loss"} for r in rows]),
        "return_loss": True,
    }


@dataclass(frozen=True)
class Case:
    """What a processor is tried with.

    Attributes:
        processor: makes it.
        rows: makes rows of what it takes.
        function: makes columns of rows by it.
        model: auto class of a tiny model in tests/auto_models.py.
        collator: makes the collator; `None` leaves the choice to the engine.
    """

    processor: Callable[[], Any]
    rows: Callable[[], datasets.Dataset]
    function: Callable[..., Any]
    model: str
    collator: Callable[[], Any] | None = None


CASES = {
    "images": Case(
        image_processor, lambda: labelled("image", images(8)), of_images, "AutoModelForImageClassification"
    ),
    # Rows of different lengths: padded, by the default collator, as the extractor pads.
    "sounds": Case(
        hf.Wav2Vec2FeatureExtractor,
        lambda: labelled("sound", sounds(8)),
        of_sounds,
        "AutoModelForAudioClassification",
    ),
    "speech": Case(
        whisper_extractor, lambda: labelled("sound", sounds(8)), of_speech, "AutoModelForSpeechSeq2Seq"
    ),
    "images and text": Case(
        clip_processor,
        lambda: labelled("image", images(8)),
        of_pairs,
        "AutoModelForZeroShotImageClassification",
        lambda: with_loss,
    ),
}


def job_of(case: Case, folder: str, *, lazily: bool) -> Job:
    def prepare(_: Any) -> datasets.Dataset:
        rows = case.rows()
        if lazily:
            return rows.with_transform(case.function)
        return rows.map(case.function, batched=True, remove_columns=rows.column_names)

    name = case.model
    return Job(
        settings={
            "output_dir": folder,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        model=lambda: MODELS[name].model(name),
        rows=8,
        eval_rows=0,
        as_dataset=prepare,
        collator=case.collator,
        processing_class=case.processor(),
        has_ids=False,
        is_recorded=False,
        compute_metrics=None,
    )


def without_weights(folder: str) -> dict[str, Any]:
    """Read what a checkpoint has of the model's and the processor's configurations, and list its files."""
    files = sorted(Path(folder, "checkpoint-2").iterdir())
    told = {
        file.name: json.loads(file.read_text())
        for file in files
        if file.suffix == ".json" and file.name != "trainer_state.json"
    }
    return {"files": [file.name for file in files], **told}


@pytest.mark.parametrize(
    "lazily", [pytest.param(False, id="map", marks=pytest.mark.long), pytest.param(True, id="with_transform")]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trained_and_saved_as_natively(case: Case, *, lazily: bool) -> None:
    theirs = run_theirs(job_of(case, "theirs", lazily=lazily))
    ours = run_ours(job_of(case, "ours", lazily=lazily))
    assert_identical(theirs, ours)
    assert ours.steps[0]["weights"] != ours.steps[1]["weights"]
    assert without_weights("theirs") == without_weights("ours")
    processor = case.processor()
    read = type(processor).from_pretrained("ours/checkpoint-2")
    assert read.to_dict() == type(processor).from_pretrained("theirs/checkpoint-2").to_dict()
    assert {"preprocessor_config.json", "processor_config.json"} & set(without_weights("ours"))


def test_map_function_is_map() -> None:
    """What HFDataModule maps by `map_function` is what the native Trainer is given mapped."""
    case = CASES["sounds"]
    theirs = run_theirs(job_of(case, "theirs", lazily=False))
    ours = replace(
        job_of(case, "ours", lazily=False),
        as_dataset=lambda _: case.rows(),
        data_arguments={"map_function": case.function, "map_kwargs": {"remove_columns": ["sound", "label"]}},
    )
    assert_identical(theirs, run_ours(ours))
