"""What the ranks of a pool do with scripts of libraries: as they are, and by hfbridge.dropin.run."""

import sys
import warnings
from contextlib import chdir
from pathlib import Path

from hfbridge.dropin import run
from hfbridge.errors import BridgeWarning
from tests.dropin.libraries import SCRIPTS, run_natively

LIBRARIES = ("trl", "sentence_transformers", "setfit")


def run_script(folder: Path, side: str, name: str, arguments: list[str], strategy: str | None = None) -> None:
    """Run a script on all ranks.

    Args:
        folder: where it runs.
        side: "theirs" or "ours"; the libraries are imported anew, and so subclass the Trainer of the side.
        name: of the script.
        arguments: of the script.
        strategy: of hfbridge.
    """
    for module in [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]:
        del sys.modules[module]
    with chdir(folder):
        if side == "theirs":
            run_natively(name, arguments)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BridgeWarning)  # this process has imported transformers.Trainer
            assert run(SCRIPTS / f"{name}.py", arguments, strategy=strategy) == 0
