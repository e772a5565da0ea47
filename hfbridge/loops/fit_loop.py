"""Lightning's loop over the epochs, where a resumed run has nothing left to train.

Lightning then calls no hook at all. The HF Trainer fires `on_train_begin`, logs the final entry, loads the
best model and fires `on_train_end`: so does the host; Lightning's own callbacks are left alone.

`_FitLoop` and its `_restarting` are private names of Lightning.
"""

from dataclasses import replace
from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop

from hfbridge.module import HFModule


class FitLoop(_FitLoop):
    """Lightning's loop over the epochs, which ends a run of HFModule that was complete when it was resumed.

    Proved by: tests/parity/test_resume.py
    """

    def run(self) -> None:
        """Train all epochs."""
        super().run()
        module: Any = self.trainer.lightning_module
        if (
            self._restarting and isinstance(module, HFModule) and module.resumption is not None
        ):  # none was run
            module.resumption = replace(module.resumption, steps_in_epoch=0)  # begin no epoch
            module.host.on_train_start(self.trainer, module)
            module.host.on_train_end(self.trainer, module)
            self._restarting = False
