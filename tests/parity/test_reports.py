"""What reporters are told is what the native Trainer tells them: names, values, steps, texts.

Grade: exact, apart from times. Each engine reports into a folder of its own, which is read back.
"""

import csv
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import rewrite_logs

import hfbridge
from tests.parity.engines import Job, Record, run_ours, run_theirs

TIMES = ("runtime", "per_second")
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "run_name": "my run",
}
JOB = Job("distilbert", SETTINGS, rows=22)


def has_no_time(name: str) -> bool:
    return not any(time in name for time in TIMES)


def run_each(job: Job, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Record, Path]]:
    """Run the native engine, then ours, each in a folder of its own; both write to "out" there."""
    for name, run in (("theirs", run_theirs), ("ours", run_ours)):
        folder = Path(name).absolute()
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            yield run(job), folder


def rows_as_reported(record: Record) -> dict[str, list[tuple[int, float]]]:
    """Turn a history into what reporters should have: per name, steps and values."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in record.log_history:
        for name, value in rewrite_logs({k: v for k, v in row.items() if k != "step"}).items():
            found.setdefault(name, []).append((row["step"], value))
    return found


# TensorBoard.


def read_tensorboard(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read all scalars without times, as tag -> [(step, value)], and all texts."""
    scalars: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for directory in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        for tag in filter(has_no_time, events.Tags()["scalars"]):
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["tensors"]:
            texts[tag] = b"".join(event.tensor_proto.string_val[0] for event in events.Tensors(tag)).decode()
    return scalars, texts


def float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    job = JOB.with_settings(report_to="tensorboard")
    (theirs, their_folder), (ours, our_folder) = run_each(job, monkeypatch)
    their_scalars, their_texts = read_tensorboard(their_folder)
    our_scalars, our_texts = read_tensorboard(our_folder)
    assert our_scalars == their_scalars
    assert sorted(our_texts) == ["args/text_summary", "model_config/text_summary"]
    assert our_texts == their_texts
    assert json.loads(our_texts["args/text_summary"])["run_name"] == "my run"
    assert ours.log_history == theirs.log_history
    expected = rows_as_reported(ours)
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "train/train_loss"} <= set(
        our_scalars
    )
    for name, points in our_scalars.items():
        assert points == [(step, float32(value)) for step, value in expected[name]], name
    for folder in (their_folder, our_folder):
        (run,) = (folder / "out" / "runs").iterdir()
        assert list(run.glob("events.out.tfevents.*"))


def test_an_evaluation_after_training_is_reported_into_the_same_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = JOB.with_settings(report_to="tensorboard", max_steps=2)
    found = []
    for record, folder in run_each(job, monkeypatch):
        if record.module is None:
            record.engine.evaluate()
        else:
            data = hfbridge.HFDataModule(eval_dataset=job.datasets()[1], data_collator=job.make_collator())
            record.engine.validate(record.module, data, verbose=False)
        for callback in (
            record.engine.callback_handler.callbacks
            if record.module is None
            else record.module.host.handler.callbacks
        ):
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.close()
        assert len({path.parent for path in folder.rglob("events.out.tfevents.*")}) == 1
        found.append(read_tensorboard(folder))
    assert found[0] == found[1]
    assert len(found[0][0]["eval/loss"]) == 2


def test_the_folder_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "chosen")
    found = []
    for _, folder in run_each(JOB.with_settings(report_to=["tensorboard"], max_steps=2), monkeypatch):
        assert {path.parent for path in folder.rglob("events.out.tfevents.*")} == {folder / "chosen"}
        found.append(read_tensorboard(folder))
    assert found[0] == found[1]


def test_the_old_name_of_the_folder_is_answered() -> None:
    try:
        settings = hfbridge.Settings(output_dir="out", logging_dir="elsewhere")
    except hfbridge.SettingsError as error:
        said = str(error)
    else:
        said = " ".join(settings.notes)
    assert "logging_dir" in said
    assert "TENSORBOARD_LOGGING_DIR" in said


# Weights & Biases.


def read_wandb(folder: Path) -> dict[str, Any]:
    """Read the one run in a folder: configuration, rows, summary, name, project."""
    from wandb.proto import wandb_internal_pb2 as proto

    (path,) = folder.rglob("*.wandb")
    found: dict[str, Any] = {"config": {}, "rows": [], "summary": {}, "metrics": []}
    for data in records_in(path.read_bytes()):
        record = proto.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["name"], found["project"] = record.run.display_name, record.run.project
        if kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            found["config"] |= {item.key or tuple(item.nested_key): item.value_json for item in config.update}
        elif kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found["rows"].append({k: v for k, v in row.items() if has_no_time(k) and not k.startswith("_")})
        elif kind == "summary":
            for item in record.summary.update:
                name = item.key or "/".join(item.nested_key)
                if has_no_time(name) and not name.startswith("_"):
                    found["summary"][name] = json.loads(item.value_json)
        elif kind == "metric":
            found["metrics"].append((record.metric.name, record.metric.glob_name, record.metric.step_metric))
    found["config"].pop("_wandb", None)
    return found


def records_in(content: bytes) -> Iterator[bytes]:
    """Read a LevelDB log: blocks of 32 KiB, in which records have a checksum, a length and a part's kind."""
    at, parts, (full, first, last) = 7, b"", (1, 2, 4)
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0:
            return
        data = content[at + 7 : at + 7 + length]
        at += 7 + length
        parts = data if kind in (full, first) else parts + data
        if kind in (full, last):
            yield parts


@pytest.mark.slow
def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "mine"}.items():
        monkeypatch.setenv(name, value)
    found, records = [], []
    for record, folder in run_each(JOB.with_settings(report_to="wandb"), monkeypatch):
        wandb.finish()
        wandb.teardown()  # of the process that writes for all runs
        found.append(read_wandb(folder))
        records.append(record)
    theirs, ours = found
    assert ours == theirs
    assert (ours["name"], ours["project"]) == ("my run", "mine")
    assert ours["config"]["learning_rate"] == "0.01"
    assert "train_loss" in ours["summary"]
    assert [row["train/global_step"] for row in ours["rows"]] == [
        row["step"] for row in records[1].log_history
    ]
    losses = [row["train/loss"] for row in ours["rows"] if "train/loss" in row]
    assert losses == [row["loss"] for row in records[1].log_history if "loss" in row]


# MLflow.


def read_mlflow(store: Path) -> dict[str, Any]:
    """Read the one run of a file store: metrics as (step, value), parameters, name, status."""
    (run,) = (path.parent for path in store.glob("*/*/meta.yaml"))
    metrics = {}
    for path in (run / "metrics").iterdir():
        if has_no_time(path.name):
            lines = (line.split()[1:] for line in path.read_text().splitlines())
            metrics[path.name] = [(int(step), float(value)) for value, step in lines]
    parameters = {path.name: path.read_text() for path in (run / "params").iterdir()}
    return {
        "metrics": metrics,
        "parameters": parameters,
        "name": (run / "tags" / "mlflow.runName").read_text(),
        "status": [line for line in (run / "meta.yaml").read_text().splitlines() if "status" in line],
    }


@pytest.mark.slow
def test_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    found, records = [], []
    for record, folder in run_each_into_stores(mlflow, monkeypatch):
        mlflow.flush_async_logging()
        found.append(read_mlflow(folder / "store"))
        records.append(record)
    theirs, ours = found
    assert ours == theirs
    assert ours["name"] == "my run"
    assert ours["parameters"]["learning_rate"] == "0.01"
    expected = [(row["step"], row["loss"]) for row in records[1].log_history if "loss" in row]
    assert ours["metrics"]["loss"] == expected


def run_each_into_stores(mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Record, Path]]:
    """Point MLflow to a store of each engine's own before it runs."""
    for name, run in (("theirs", run_theirs), ("ours", run_ours)):
        folder = Path(name).absolute()
        folder.mkdir()
        mlflow.set_tracking_uri((folder / "store").as_uri())
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            yield run(JOB.with_settings(report_to="mlflow")), folder
    mlflow.set_tracking_uri(None)


# Lightning's loggers.


def fit_with(logger: Any, **settings: Any) -> hfbridge.Trainer:
    """Run our engine with a logger of Lightning's."""
    job = JOB.with_settings(**settings)
    train, evaluation = job.datasets()
    trainer = hfbridge.Trainer(job.arguments(), logger=logger, enable_model_summary=False)
    data = hfbridge.HFDataModule(
        train_dataset=train, eval_dataset=evaluation, data_collator=job.make_collator()
    )
    module = hfbridge.HFModule(
        job.make_model(), compute_metrics=job.compute_metrics, loss_normalization="native"
    )
    trainer.fit(module, data)
    return trainer


def read_csv(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read Lightning's table, as name -> [(step, value)], without times."""
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step" and has_no_time(name):
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def test_a_csv_of_lightnings_has_the_entries_under_the_names_of_callback_metrics(tmp_path: Path) -> None:
    theirs = run_theirs(JOB)
    trainer = fit_with(CSVLogger(tmp_path, name="csv"))
    found = read_csv(Path(trainer.logger.log_dir) / "metrics.csv")  # type: ignore[union-attr]
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in theirs.log_history:
        for name, value in row.items():
            if name != "step":
                expected.setdefault(name, []).append((row["step"], value))
    assert {"loss", "grad_norm", "learning_rate", "eval_loss", "train_loss"} <= set(found)
    # A table has one line a step: where a step has several rows, the epoch stands there once.
    assert {n: dict(points) for n, points in found.items()} == {
        n: dict(points) for n, points in expected.items()
    }


def test_a_reporter_and_a_logger_have_every_row_once(tmp_path: Path) -> None:
    class Kept(CSVLogger):
        told: list[tuple[Any, dict[str, float]]]

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.__dict__.setdefault("told", []).append((step, dict(metrics)))

    logger = Kept(tmp_path, name="csv")
    trainer = fit_with(logger, report_to="tensorboard")
    history = trainer.log_history
    assert [step for step, _ in logger.told] == [row["step"] for row in history]
    for (_, told), row in zip(logger.told, history, strict=True):
        assert told == {name: v for name, v in row.items() if name != "step"}
    scalars, _ = read_tensorboard(Path("out"))
    assert len(scalars["train/loss"]) == sum("loss" in row for row in history)
    assert len(scalars["eval/loss"]) == sum("eval_loss" in row for row in history)


def test_nothing_is_reported_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, folder in run_each(JOB, monkeypatch):
        assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert "WANDB_PROJECT" not in os.environ
