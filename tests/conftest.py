"""What every test is given: fresh seeds, its own directory, no network; and what no test may leave behind.

Packages other than torch are reset only once a test has imported them, so that tests of pure code stay fast.
"""

import functools
import gc
import importlib.metadata
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from tests.long_cases import KEPT

ROOT = Path(__file__).resolve().parents[1]

# What the tools of a test run write to the repository root themselves.
WRITTEN_BY_TOOLS = (".coverage", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", "__pycache__")


def pytest_configure(config: pytest.Config) -> None:
    """Have torch compile extensions into the cache of the tests, where no killed run has left a lock.

    Any run that needs an extension would wait for such a lock for ever.
    """
    if not hasattr(config, "cache"):  # with -p no:cacheprovider torch's own place has to do
        return
    folder = config.cache.mkdir(f"extensions-py{sys.version_info.minor}-{torch.__version__}")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    if not hasattr(config, "workerinput"):
        for lock in folder.glob("*/lock"):
            lock.unlink()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as long what only `make test-all` runs; the table of it must name cases that are there."""
    cases: dict[str, set[str]] = {}
    for item in items:
        test, callspec = item.nodeid.partition("[")[0].removeprefix("tests/"), getattr(item, "callspec", None)
        if test in KEPT and callspec is not None:
            cases.setdefault(test, set()).add(callspec.id)
            if callspec.id not in KEPT[test]:
                item.add_marker(pytest.mark.long)
    if not any("::" in str(arg) for arg in config.args):
        gone = {test: set(KEPT[test]) - found for test, found in cases.items()}
        if any(gone.values()):
            raise pytest.UsageError(f"tests/long_cases.py keeps cases that are not there: {gone}")


def pytest_collection_finish() -> None:
    """Have garbage looked for among what the tests make: not in the modules that are imported by now.

    The native Trainer looks for garbage before it trains, and after each lack of memory.
    """
    gc.collect()
    gc.freeze()


# Lightning looks for entry points in each installed package whenever a Trainer is made.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


class NetworkAccessError(RuntimeError):
    """A test tried to reach another machine. Not an OSError: libraries retry those, or swallow them."""


def is_local(host: Any) -> bool:
    """Whether a socket may connect to `host`, a name or an address."""
    if host is None or host in ("", b"", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let only loopback and unix sockets connect, and only local names be looked up."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse_unless_local(host: Any) -> None:
        if not is_local(host):
            raise NetworkAccessError(
                f"a test tried to reach {host!r}; build what it needs in code (tests/tiny.py)"
            )

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refuse_unless_local(address[0])
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if self.family != socket.AF_UNIX:
            refuse_unless_local(address[0])
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_unless_local(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        # The guard does not reach child processes; these do.
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(autouse=True)
def restored_environment(no_network: None) -> Iterator[None]:
    """Undo changes of os.environ; upstream launchers and TrainingArguments leave variables behind."""
    before = dict(os.environ)
    yield
    for name in (os.environ.keys() | before.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(autouse=True)
def fresh_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def files_in_root() -> set[str]:
    """Names in the repository root that no tool of the test run writes."""
    return {name for name in os.listdir(ROOT) if not name.startswith(WRITTEN_BY_TOOLS)}


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path) -> Iterator[None]:
    """Run the test in its tmp_path, and fail it if something new stands in the repository root afterwards."""
    before, was_in = files_in_root(), Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(was_in)
    stray = files_in_root() - before
    if stray:
        pytest.fail(f"left in the repository root: {sorted(stray)}; write below tmp_path")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model that fails the test when it is loaded."""
    from transformers import AutoModelForSequenceClassification

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    return "some-user/some-model"


def torch_flags() -> dict[str, Any]:
    """Process-wide switches of torch that change numbers."""
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
    }


def restore_torch_flags(flags: dict[str, Any]) -> None:
    """Set what `torch_flags` has read."""
    torch.set_default_dtype(flags["dtype"])
    torch.set_grad_enabled(flags["grad"])
    torch.use_deterministic_algorithms(flags["deterministic"], warn_only=flags["warn_only"])
    torch.backends.cudnn.deterministic = flags["cudnn_deterministic"]
    torch.backends.cudnn.benchmark = flags["cudnn_benchmark"]
    torch.set_num_threads(flags["threads"])


def forget_tf32() -> None:
    """Set every TF32 switch to torch's default.

    There are an older and a newer (torch 2.9) set of them, and once only the newer is set, the older cannot
    even be read; hence both are set, the newer first, and none is read.
    """
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(autouse=True)
def restored_torch() -> Iterator[None]:
    """One thread, so that sums are taken in one order; flags restored; no process group left open."""
    torch.set_num_threads(1)
    before = torch_flags()
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if torch_flags() != before:
        restore_torch_flags(before)
    forget_tf32()


@pytest.fixture(autouse=True)
def restored_accelerate() -> Iterator[None]:
    """Forget accelerate's process-wide state, or the next Accelerator would keep this one's precision."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.PartialState._reset_state()
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def restored_verbosity() -> Iterator[None]:
    """Restore the log level of transformers, which TrainingArguments may change."""
    logging = sys.modules.get("transformers.utils.logging")
    before = logging.get_verbosity() if logging is not None else None
    yield
    logging = sys.modules.get("transformers.utils.logging")
    if logging is not None:
        default = before if before is not None else logging._get_default_logging_level()
        if logging.get_verbosity() != default:
            logging.set_verbosity(default)


@pytest.fixture
def shared_data() -> Path:
    """Data sets too large for the repository: the folder `shared` beside it. Skips where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder ../shared beside the repository ({folder} is missing)")
    return folder
