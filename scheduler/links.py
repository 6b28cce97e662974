"""Contended links, by slot of their store node: what was booked on each node's NIC, both ways, and on its SSD and has
not passed yet.

A link passes its bytes one after the other. So all that is known of it is when the bytes booked so far will have
passed; what is left drains as time passes.
"""

from __future__ import annotations

from mooncake.core.types import NANOS_PER_S
from mooncake.scheduler.config import Rates


class Links:
    """Nanoseconds of the Conductor's clock by slot. Slot 0 is nobody's and stays free."""

    def __init__(self, rates: Rates) -> None:
        self._nic_ns_per_byte = NANOS_PER_S / rates.nic_bytes_per_s
        self._ssd_ns_per_byte = NANOS_PER_S / rates.ssd_bytes_per_s
        self.out_until = [0.0]
        self.in_until = [0.0]
        self.ssd_until = [0.0]
        self.busy_until = 0.0
        """The latest of all; after it every link is free."""

    def resize(self, width: int) -> None:
        for until in (self.out_until, self.in_until, self.ssd_until):
            until.extend([0.0] * (width - len(until)))

    def clear(self, slot: int) -> None:
        for until in (self.out_until, self.in_until, self.ssd_until):
            until[slot] = 0.0

    def book_transfer(self, source: int, target: int, num_bytes: int, now: int) -> None:
        """From node to node. On one machine, or where a node is not known, nothing passes a NIC."""
        if source == target or not source:
            return
        duration = num_bytes * self._nic_ns_per_byte
        self._occupy(self.out_until, source, duration, now)
        if target:
            self._occupy(self.in_until, target, duration, now)

    def book_ssd(self, slot: int, num_bytes: int, now: int) -> None:
        if slot:
            self._occupy(self.ssd_until, slot, num_bytes * self._ssd_ns_per_byte, now)

    def _occupy(self, until: list[float], slot: int, duration: float, now: int) -> None:
        free_at = until[slot] = max(until[slot], now) + duration
        self.busy_until = max(self.busy_until, free_at)
