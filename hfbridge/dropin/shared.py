"""SharedRun: a sharded model, evaluated and saved through the Lightning strategy that has sharded it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer import TRAINING_ARGS_NAME

from hfbridge.distributed import collectives
from hfbridge.dropin.host import NativeHost
from hfbridge.dropin.steps import OwnSteps
from hfbridge.trainer import Trainer


class SharedRun:
    """Evaluate, predict and save a sharded model through the strategy of its run."""

    def __init__(self, trainer: Trainer, module: OwnSteps, host: NativeHost) -> None:
        self._trainer, self._module, self._host = trainer, module, host
        self._is_calling = False

    def call(self, method: Callable[[], Any]) -> Any:
        """Call a method of the HF Trainer within the strategy's `predict`; called by all ranks."""
        if self._is_calling:
            return method()
        results: list[Any] = []

        def step() -> None:
            self._host.show_model(self._module)
            results.append(method())

        self._is_calling, self._module.own_predict_step = True, step
        try:
            once: Any = [None] * self._trainer.world_size  # a step of each rank
            self._trainer.predict(self._module, DataLoader(once, collate_fn=list), return_predictions=False)
        finally:
            self._is_calling, self._module.own_predict_step = False, None
        return results[0]

    def save(self, native: Any, folder: Path) -> None:
        """Write the model for `from_pretrained`; called by all ranks.

        Mirrors: transformers.Trainer.save_model
        """
        self._module.save_pretrained(folder)
        with collectives.raise_on_all_ranks():
            if native.args.should_save:
                torch.save(native.args, folder / TRAINING_ARGS_NAME)
