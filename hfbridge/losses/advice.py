"""Advice: how the user of each tool does what a message advises. Pure.

One run stands behind several tools, and what it has to tell is the same; what can be done about it is not.

tool                     "exact" or "native" is chosen by                 its Advice is in
HFModule                 an argument                                      this file
from_trainer             an argument                                      dropin/from_trainer.py
hfbridge.dropin, run     an attribute of the Trainer                      dropin/run_setup.py
compare                  the name of an engine                            compare/engines.py
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Advice:
    """How the user of a tool does what messages advise; each text is the end of a sentence.

    Attributes:
        exact: how the loss becomes that of `loss_normalization="exact"`.
        native: likewise "native".
        resume: how a run goes on from the checkpoint that a setting names; `None` where there is nothing to
            be done.
        tells_of_fields: whether a subclass of TrainingArguments loses its own fields on the way to callbacks.
    """

    exact: str = 'pass loss_normalization="exact" to HFModule'
    native: str = 'pass loss_normalization="native" to HFModule'
    resume: str | None = "pass it to trainer.fit as ckpt_path="
    tells_of_fields: bool = True

    def choosing(self, normalization: Literal["exact", "native"]) -> str:
        """Tell how one of the two losses is chosen."""
        return self.exact if normalization == "exact" else self.native


OF_MODULE = Advice()
