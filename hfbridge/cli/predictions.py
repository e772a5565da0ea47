"""What `hfbridge predict` writes into output_dir.

file                          holds
predictions.npz               predictions, and label_ids if there are labels; several of them by number
generated_predictions.txt     with predict_with_generate: a text a line, line breaks as spaces
predict_results.json          the metrics
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hfbridge.datamodule import HFDataModule
from hfbridge.evaluation.generation import decode
from hfbridge.module import HFModule
from hfbridge.trainer import DEFAULT_OUTPUT_DIR, Trainer


def write_predictions(trainer: Trainer, module: HFModule, data: HFDataModule, *, ckpt_path: Any) -> None:
    """Predict a whole set, and write what comes of it on the first rank.

    Args:
        trainer: whose settings say where to.
        module: the module.
        data: its `predict_dataset`, or test split.
        ckpt_path: whose weights to take; those of the module without it.

    Raises:
        BridgeError: the set or the checkpoint is not there, or the module cannot predict.
    """
    output = trainer.predict_dataset(module, data, metric_key_prefix="predict", ckpt_path=ckpt_path)
    if not trainer.is_global_zero:
        return
    folder = Path(trainer.settings.output_dir or DEFAULT_OUTPUT_DIR).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {**_arrays("predictions", output.predictions), **_arrays("label_ids", output.label_ids)}
    written = [folder / "predictions.npz"]
    np.savez(written[0], **arrays)
    if trainer.settings.predict_with_generate and module.processing_class is not None:
        texts = decode(output, module.processing_class)
        written.append(folder / "generated_predictions.txt")
        written[-1].write_text("".join(f"{' '.join(text.split())}\n" for text in texts), encoding="utf-8")
    if output.metrics:
        written.append(folder / "predict_results.json")
        written[-1].write_text(json.dumps(output.metrics, indent=2, default=float) + "\n", encoding="utf-8")
    for path in written:
        print(f"{path} is written.")


def _arrays(name: str, found: Any) -> dict[str, Any]:
    """Name the arrays of predictions, of which a model may give several, nested."""
    if found is None:
        return {}
    if isinstance(found, dict):
        parts = list(found.items())
    elif isinstance(found, list | tuple):
        parts = list(enumerate(found))
    else:
        return {name: np.asarray(found)}
    return {key: array for index, part in parts for key, array in _arrays(f"{name}_{index}", part).items()}
