"""Stop all ranks at the same point when a signal reaches one of them, without a collective at each step.

A rank that stopped alone would leave the others waiting in a collective. A thread of each rank polls keys of
the process group's store. Once a stop is requested, every rank holds at its next point and publishes how many
it has completed; all continue to the highest number and stop there. A point costs a lock.
"""

import threading
import uuid

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from hfbridge.distributed import collectives

_LOOKS_EVERY_S, _WAITS_S, _GIVES_UP_S = 0.25, 0.02, 2.0


class CoordinatedStop:
    """Stop all ranks at the same point of their common work.

    All ranks of an open process group make it, which is a collective, and close it.

    Attributes:
        stop_requested: set it on any rank to stop all.

    Proved by: tests/distributed/test_stopping.py
    """

    def __init__(self) -> None:
        self.stop_requested = False
        # A store outlives runs, and groups that are restarted: each of these has keys of its own.
        name = collectives.gather(uuid.uuid4().hex)[0]
        self._store = PrefixStore(f"hfbridge/stop/{name}", _get_default_store())
        self._lock = threading.Lock()
        self._passed = self._last = 0
        self._holds = self._is_alone = False
        self._closed, self._decided = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hfbridge-stop", daemon=True)
        self._thread.start()

    def should_continue(self) -> bool:
        """Whether this rank continues beyond a point; false from the point on at which all ranks stop."""
        with self._lock:
            if not (self._holds or (self._is_alone and self.stop_requested)):
                self._passed += 1
                return True
        self._decided.wait()
        if self._passed >= self._last:
            return False
        self._passed += 1
        return True

    def close(self) -> None:
        """End the thread, without waiting for a store whose rank is gone."""
        self._closed.set()
        self._thread.join(_GIVES_UP_S)

    def _watch(self) -> None:
        """Wait until a stop is requested, and find out where all ranks stop."""
        own, everyone = str(collectives.rank()), [str(number) for number in range(collectives.count())]
        try:
            while not self._closed.wait(_LOOKS_EVERY_S):
                if self.stop_requested:
                    self._store.set("requested", "")
                if not self._store.check(["requested"]):
                    continue
                with self._lock:
                    self._holds = True
                self._store.set(own, str(self._passed))
                while not self._store.check(everyone):
                    if self._closed.wait(_WAITS_S):
                        return
                self._last = max(int(self._store.get(key)) for key in everyone)
                return
        except RuntimeError:  # the store is gone: each rank stops by its own signal
            self._is_alone, self._last = True, 0
        finally:
            self._decided.set()
