"""An event loop that stays awake for a while after it was asked something.

A process that sleeps is woken in 40 to 90 us on a virtual machine, ten times as long as most questions take to answer; and
who asked once often asks again right away. So the loop goes on turning, which costs a processor that has nothing else to do
up to AWAKE_S a question.
"""

from __future__ import annotations

import asyncio
import time

AWAKE_S = 200e-6


class Wakeful:
    """Of one event loop, the running one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._until = 0.0
        self._turning = False

    def stir(self) -> None:
        """Something came; more may follow."""
        self._until = time.monotonic() + AWAKE_S
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = time.monotonic() < self._until
        if self._turning:
            self._loop.call_soon(self._turn)
