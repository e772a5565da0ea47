"""SharedRun: a model whose parts lie on several ranks, evaluated and saved where its strategy holds it ready.

Natively, evaluate and save_model ask accelerate, which knows nothing of what Lightning has cut.
"""

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
    """What evaluations, predictions and savings of a shared model go through.

    Args:
        trainer: of the run.
        module: of the run.
        host: of the run.
    """

    def __init__(self, trainer: Trainer, module: OwnSteps, host: NativeHost) -> None:
        self._trainer, self._module, self._host = trainer, module, host
        self._is_calling = False

    def call(self, method: Callable[[], Any]) -> Any:
        """Call a method of the HF Trainer's while the strategy has the model ready; all ranks do so together.

        Returns:
            What it returns.
        """
        if self._is_calling:
            return method()
        answers: list[Any] = []

        def step() -> None:
            self._host.show_model(self._module)
            answers.append(method())

        self._is_calling, self._module.own_predict_step = True, step
        try:
            once: Any = [None] * self._trainer.world_size  # a step of each rank
            self._trainer.predict(self._module, DataLoader(once, collate_fn=list), return_predictions=False)
        finally:
            self._is_calling, self._module.own_predict_step = False, None
        return answers[0]

    def save(self, native: Any, folder: Path) -> None:
        """Write the model for `from_pretrained`; all ranks call this together.

        Mirrors: transformers.Trainer.save_model
        """
        self._module.save_pretrained(folder)
        with collectives.raise_on_all_ranks():
            if native.args.should_save:
                torch.save(native.args, folder / TRAINING_ARGS_NAME)
