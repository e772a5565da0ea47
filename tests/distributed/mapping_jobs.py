"""What the ranks of a pool run for test_mapping.py and test_agreement.py: short runs, some of which fail."""

import gc
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist

import hfbridge
from tests.tiny import PadRows, make_dataset, make_model

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
QUIET: dict[str, Any] = {"enable_model_summary": False}


def rank() -> int:
    return int(os.environ["RANK"])


def told(error: Exception | None) -> tuple[str, str]:
    return ("", "") if error is None else (type(error).__name__, str(error))


def add_one(rows: dict[str, list[Any]], *, calls: str, wait_s: float = 0) -> dict[str, list[Any]]:
    """A map function that writes down that it was called, and on which rank."""
    with open(calls, "a") as file:
        file.write(f"{rank()}:{len(rows['input_ids'])}\n")
    time.sleep(wait_s)
    return {"input_ids": [[i + 1 if i < 40 else i for i in ids] for ids in rows["input_ids"]]}


def fail_late(rows: dict[str, list[Any]], *, calls: str) -> dict[str, list[Any]]:
    """A map function that fails after its trial."""
    mapped = add_one(rows, calls=calls)
    if len(rows["input_ids"]) > 2:
        raise KeyError("no column of this name")
    return mapped


def map_with(
    kind: str,
    folder: str,
    map_kwargs: dict[str, Any],
    function: str = "add_one",
    settings: Any = None,
    wait_s: float = 0,
) -> dict[str, Any]:
    """Train on mapped data.

    Args:
        kind: where the set is: "memory", "disk", or with a "transform" that does not pickle.
        folder: for what all ranks share.
        map_kwargs: further arguments of `datasets.map`.
        function: the map function.
        settings: further ones.
        wait_s: what a call of it takes.
    """
    known = {"add_one": partial(add_one, wait_s=wait_s), "fail_late": fail_late}[function]
    given = make_dataset("llama", 21)
    if kind == "disk":
        if rank() == 0 and not Path(folder, "set").exists():
            given.save_to_disk(f"{folder}/set")
        if dist.is_initialized():
            dist.barrier()
        while not Path(folder, "set", "state.json").exists():
            time.sleep(0.01)
        given = datasets.load_from_disk(f"{folder}/set")
    elif kind == "transform":
        given = given.with_transform(lambda rows: rows)
    data = hfbridge.HFDataModule(
        train_dataset=given,
        map_function=partial(known, calls=f"{folder}/calls"),
        map_kwargs=map_kwargs,
        data_collator=PadRows(),
    )
    module = hfbridge.HFModule(make_model("llama"))
    error: Exception | None = None
    try:
        trainer = hfbridge.Trainer({**SETTINGS, **(settings or {})}, **QUIET)
        trainer.fit(module, data)
    except Exception as raised:
        error = raised
    mapped = data._mapped.get("train")
    found = {
        "error": told(error),
        "ids": None if mapped is None else mapped.with_format(None)["input_ids"][:],
        "files": [] if mapped is None else [file["filename"] for file in mapped.cache_files],
        "here": sorted(str(path) for path in Path().rglob("*")),
        "loss": [row["loss"] for row in module.log_history if "loss" in row],
    }
    del data, module, mapped, error
    trainer.strategy._lightning_module = None
    del trainer
    gc.collect()
    found["is_left"] = [file for file in found["files"] if Path(file).exists()]
    return found


def evaluate_mapped(folder: str) -> dict[str, Any]:
    """Validate and predict on mapped data, without training; returns what is mapped then."""
    data = hfbridge.HFDataModule(
        eval_dataset=make_dataset("llama", 6),
        predict_dataset=make_dataset("llama", 5),
        map_function=partial(add_one, calls=f"{folder}/calls"),
        data_collator=PadRows(4 * 4),
    )
    module = hfbridge.HFModule(make_model("llama"))
    trainer = hfbridge.Trainer(SETTINGS, **QUIET)
    trainer.validate(module, data, verbose=False)
    found = {"after validate": sorted(data._mapped)}
    trainer.predict(module, data)
    return {**found, "after predict": sorted(data._mapped)}


def train_differing(what: str) -> tuple[str, str]:
    """Train, with something on the last rank that the first has otherwise; returns the error."""
    is_other = rank() == int(os.environ["WORLD_SIZE"]) - 1
    values = dict(SETTINGS)
    rows, kind = make_dataset("llama", 21), "llama"
    if is_other and what == "setting":
        values |= {"learning_rate": 1e-3, "run_name": "other"}
    if what == "long setting":
        values["label_names"] = ["labels", f"{'a' * 100}{rank()}"]
    if what == "order":
        rows = rows.shuffle(seed=rank())
    if is_other and what == "length":
        rows = rows.select(range(20))
    if is_other and what == "column":
        rows = rows.add_column("extra", [0] * 21)
    if is_other and what == "model":
        kind = "gpt2"
    if is_other and what == "no evaluation set":
        values["eval_strategy"] = "steps"
    model = make_model(kind)
    if is_other and what == "frozen":
        model.lm_head.weight.requires_grad = False
    try:
        module = hfbridge.HFModule(model)
        data = hfbridge.HFDataModule(train_dataset=rows, data_collator=PadRows())
        hfbridge.Trainer(values, **QUIET).fit(module, data)
    except Exception as error:
        return told(error)
    return told(None)


def train_into_folders_of_their_own() -> tuple[list[str], list[str], str]:
    """Train with another output_dir on each rank; returns the folders, warnings, and what the state says."""
    own = f"out-{rank()}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = hfbridge.HFModule(make_model("llama"))
        data = hfbridge.HFDataModule(train_dataset=make_dataset("llama", 21), data_collator=PadRows())
        settings = {**SETTINGS, "output_dir": own, "save_strategy": "epoch"}
        hfbridge.Trainer(settings, **QUIET).fit(module, data)
    saved = sorted(str(path) for path in Path().glob("out-*/checkpoint-*"))
    told = [str(one.message) for one in caught if "output_dir differs" in str(one.message)]
    return saved, told, str(module.args.output_dir)


def count_collectives() -> list[int]:
    """Train for two and for four steps; returns how many objects the ranks have exchanged in each."""
    counted: list[int] = []
    exchange = dist.all_gather_object

    def counting(*arguments: Any, **named: Any) -> None:
        counted[-1] += 1
        exchange(*arguments, **named)

    dist.all_gather_object = counting
    try:
        for steps in (2, 4):
            counted.append(0)
            data = hfbridge.HFDataModule(train_dataset=make_dataset("llama", 21), data_collator=PadRows())
            module = hfbridge.HFModule(make_model("llama"))
            hfbridge.Trainer({**SETTINGS, "max_steps": steps}, **QUIET).fit(module, data)
    finally:
        dist.all_gather_object = exchange
    return counted


def other_weights() -> list[bool]:
    """Train models of other weights on each rank, which DDP makes equal; returns whether they end equal."""
    module = hfbridge.HFModule(make_model("llama", seed=rank()))
    data = hfbridge.HFDataModule(train_dataset=make_dataset("llama", 21), data_collator=PadRows())
    hfbridge.Trainer(SETTINGS, **QUIET).fit(module, data)
    mine = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [torch.equal(one, found[0]) for one in found]
