"""Threads that the operating system knows by name, so that `top -H` and benchmarks can tell computing from the rest."""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

Work = Callable[[], None]

_PR_SET_NAME = 15
_NAME_BYTES_MAX = 15


def start_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """A daemon thread of that name, already running."""

    def named() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_NAME_BYTES_MAX], 0, 0, 0)
        run()

    thread = threading.Thread(target=named, name=name, daemon=True)
    thread.start()
    return thread


class WorkThread:
    """A thread that does one piece of work after the other. on_failure(error) is called from it if one breaks, which ends it:
    what is queued then is never done. Whoever gives it work bounds how much is queued."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = start_thread(name, self._run)

    def put(self, work: Work) -> None:
        self._queue.put(work)

    def close(self) -> None:
        """Ends the thread after the work queued so far."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (work := self._queue.get()) is not None:
                work()
        except BaseException as error:  # the boundary of the thread: whoever owns the process must hear of it
            log.exception("thread %s failed", self._thread.name)
            self._on_failure(error)
