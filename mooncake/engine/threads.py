"""Threads that the operating system knows by name, so that `top -H` and benchmarks can tell computing from the rest."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

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
