"""Words of shared memory, and the fence between them."""

from __future__ import annotations

import platform
import threading

_TOTAL_STORE_ORDER = ("x86_64", "AMD64", "i386", "i686")


def ordered() -> bool:
    """Whether this processor's stores become visible in program order, and its loads happen in it."""
    return platform.machine() in _TOTAL_STORE_ORDER


def words(memory: memoryview) -> memoryview:
    """As unsigned 64-bit words; the memory must be aligned to 8 bytes, as mappings are. One word is one load or store: format
    'Q' is a plain C access, where '<Q' would go byte by byte."""
    return memory.cast("B").cast("Q")


class Fence:
    """Every store before it is visible before any load behind it. An uncontended lock is the one thing in Python that does
    so: taking it is a locked instruction. One for each thread or guarded place: a contended lock sleeps."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        lock = self._lock
        lock.acquire()
        lock.release()
