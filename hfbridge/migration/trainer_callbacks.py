"""The callbacks of a `transformers.Trainer`, sorted into the HF Trainer's own and the user's.

in the callback list                               becomes
DefaultFlowCallback                                the host's own; missing or replaced, it is an error
a reporter that report_to names                    the host's own; removed, report_to loses its name
JITCheckpointCallback                              enable_jit_checkpoint; removed, False
ProgressCallback, NotebookProgressCallback         hfbridge's bar; removed, disable_tqdm=True
PrinterCallback                                    the host's own; removed, log entries are not printed
all others, in their order                         the same objects, without another on_init_end
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer as NativeTrainer
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hfbridge.errors import Problem

_FLOW = (
    "it decides when to log, evaluate, save and stop. Leave it in place, and change its flags in a "
    "TrainerCallback, or in the settings"
)


@dataclass
class SortedCallbacks:
    """What the callbacks of a `transformers.Trainer` become.

    Attributes:
        users: the user's own objects, in their order.
        settings: settings that express what was removed.
        print_logs: log entries are printed where no bar is shown.
        problems: what is unsupported.

    Proved by: tests/unit/migration/test_trainer_callbacks.py
    """

    users: list[TrainerCallback] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    print_logs: bool = True
    problems: list[Problem] = field(default_factory=list)


def sort_callbacks(native_trainer: NativeTrainer) -> SortedCallbacks:
    """Separate the user's callbacks from those that the HF Trainer has added.

    Mirrors: transformers.Trainer.__init__
    """
    args, found = native_trainer.args, SortedCallbacks()
    report_to = _reporters_in(args.report_to)
    reporters = get_reporting_integration_callbacks(report_to)
    shown: type[TrainerCallback] = PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
    first = [
        DefaultFlowCallback,
        *reporters,
        *([JITCheckpointCallback] if args.enable_jit_checkpoint else []),
    ]
    listed = list(native_trainer.callback_handler.callbacks)
    shown_last = next((cb for cb in reversed(listed) if type(cb) is shown), None)
    for callback in listed:
        if callback is shown_last:
            continue
        if type(callback) in first:
            first.remove(type(callback))
        else:
            found.users.append(callback)
    if DefaultFlowCallback in first:
        found.problems.append(Problem("callbacks without DefaultFlowCallback", _FLOW))
    if missing := [kind for kind in reporters if kind in first]:
        names = [name for name, kind in INTEGRATION_TO_CALLBACK.items() if kind in missing]
        kept = [name for name in report_to if name not in names]
        found.settings["report_to"] = kept or "none"
    if JITCheckpointCallback in first:
        found.settings["enable_jit_checkpoint"] = False
    if shown_last is None:
        found.print_logs = False
        if not args.disable_tqdm:
            found.settings["disable_tqdm"] = True
    return found


def _reporters_in(report_to: str | list[str] | None) -> list[str]:
    """List the reporters that a setting names, which may have been changed after the settings were made.

    Mirrors: transformers.TrainingArguments.__post_init__
    """
    named = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if named == ["all"]:
        return list(get_available_reporting_integrations())
    return [] if named == ["none"] else named
