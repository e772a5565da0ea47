"""Where all ranks stop when one of them is asked to; knows neither engine.

A signal reaches the ranks at different moments, or one of them alone, and whoever stops by itself leaves the
others waiting in a collective. They agree without one, by keys of the process group's store, which a thread
of each rank looks at:

    a rank is asked               its thread says so
    a thread has seen that        it has its rank hold at the next point, and says how many points are behind
    all have said how many        the ranks go on to the highest of these numbers, and stop there

So a point that is passed costs a lock.
"""

import threading
import uuid

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from hfbridge.distributed import collectives

_LOOKS_EVERY_S, _WAITS_S, _GIVES_UP_S = 0.25, 0.02, 2.0


class CoordinatedStop:
    """Stop all ranks at the same point of their common work.

    Made and closed by all ranks of a process group that is open, which then pass the same points. Making it
    is a collective.

    Attributes:
        stop_requested: set, from anywhere, on a rank that is asked to stop; others find out.

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
        """Pass a point, unless it is the one at which all ranks stop, or behind that."""
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
        """End the thread; a store that does not answer, since its rank is gone, is not waited for."""
        self._closed.set()
        self._thread.join(_GIVES_UP_S)

    def _watch(self) -> None:
        """Wait until a rank is asked, and find out where all stop."""
        own, everyone = str(collectives.rank()), [str(number) for number in range(collectives.count())]
        try:
            while not self._closed.wait(_LOOKS_EVERY_S):
                if self.stop_requested:
                    self._store.set("asked", "")
                if not self._store.check(["asked"]):
                    continue
                with self._lock:
                    self._holds = True
                self._store.set(own, str(self._passed))
                while not self._store.check(everyone):
                    if self._closed.wait(_WAITS_S):
                        return
                self._last = max(int(self._store.get(key)) for key in everyone)
                return
        except RuntimeError:  # the store is gone: who holds stops here, and any other when it is asked itself
            self._is_alone, self._last = True, 0
        finally:
            self._decided.set()
