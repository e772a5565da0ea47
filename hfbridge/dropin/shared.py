"""SharedRun: a model whose parts lie on several ranks, evaluated and saved by its strategy; knows both.

Natively, evaluate and save_model ask accelerate, which knows nothing of what Lightning has cut.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PredictionOutput

from hfbridge import ranks
from hfbridge.datamodule import HFDataModule
from hfbridge.dropin.host import NativeHost
from hfbridge.module import HFModule
from hfbridge.trainer import Trainer


class SharedRun:
    """What evaluations and predictions of a shared model go through.

    Args:
        trainer: of the run.
        module: of the run.
        host: of the run.
    """

    def __init__(self, trainer: Trainer, module: HFModule, host: NativeHost) -> None:
        self._trainer, self._module, self._host = trainer, module, host

    def predict(
        self, native: Any, dataset: Any, prefix: str, *, is_evaluation: bool, **gen_kwargs: Any
    ) -> PredictionOutput:
        """Predict a set; all ranks call this together.

        Args:
            native: the Trainer, whose collator makes the batches.
            dataset: the set.
            prefix: what the metrics' names begin with.
            is_evaluation: `on_predict` is not fired.
            **gen_kwargs: arguments of `generate`, which win over the settings.
        """
        data = HFDataModule(
            predict_dataset=dataset,
            processing_class=native.processing_class,
            data_collator=native.data_collator,
        )
        self._host.is_silent = is_evaluation
        try:
            return self._trainer.predict_dataset(self._module, data, metric_key_prefix=prefix, **gen_kwargs)
        finally:
            self._host.is_silent = False

    def save(self, native: Any, folder: Path) -> None:
        """Write the model for `from_pretrained`; all ranks call this together.

        Mirrors: transformers.Trainer.save_model
        """
        self._module.save_pretrained(folder)
        with ranks.together():
            if native.args.should_save:
                torch.save(native.args, folder / TRAINING_ARGS_NAME)
