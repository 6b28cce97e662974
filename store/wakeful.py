"""Looking for the next message for a while before going to sleep.

A process that sleeps is woken in 40 to 90 us on a virtual machine, ten times as long as most questions take to answer; and
who asked once often asks again right away. So both ends of a connection stay awake for up to AWAKE_S after each message, as
long as there are processors that nobody else wants: where there are none, who looks keeps from working whom it waits for.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

AWAKE_S = 200e-6
_LOOK_S = 0.01
"""How often it is looked for free processors."""
_LOADAVG = Path("/proc/loadavg")


class Patience:
    """How long somebody looks before it sleeps. Not for two threads at a time."""

    def __init__(self) -> None:
        self._num_processors = len(os.sched_getaffinity(0))
        self._until = 0.0
        self._looks_at = 0.0
        self._spare = False

    def start(self) -> None:
        """From now on."""
        now = time.monotonic()
        if now >= self._looks_at:
            self._looks_at = now + _LOOK_S
            self._spare = _num_running() <= self._num_processors
        self._until = now + AWAKE_S if self._spare else 0.0

    def lasts(self) -> bool:
        return time.monotonic() < self._until


class Wakeful:
    """An event loop, the running one, that turns by itself for a while after it was stirred."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience = Patience()
        self._turning = False

    def stir(self) -> None:
        """Something came; more may follow."""
        self._patience.start()
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = self._patience.lasts()
        if self._turning:
            self._loop.call_soon(self._turn)


def _num_running() -> int:
    """Threads of the machine that run or could, this one among them."""
    return int(_LOADAVG.read_text().split()[3].partition("/")[0])
