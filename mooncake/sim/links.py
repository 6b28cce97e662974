"""Bandwidth: a link passes one byte after the other, first come, first served. A transfer occupies every link of its path."""

from __future__ import annotations

from collections.abc import Sequence

from mooncake.core.types import NANOS_PER_S


class Link:
    """One direction of a NIC, a PCIe connection, a machine's memory, or its SSD both ways."""

    def __init__(self, name: str, bytes_per_s: float) -> None:
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.busy_ns = 0
        self.waited_ns = 0
        """What transfers waited for those before them, all together."""
        self.num_bytes = 0
        self._ns_per_byte = NANOS_PER_S / bytes_per_s
        self._free_at = 0

    def occupy(self, num_bytes: int, now: int) -> int:
        """When these bytes have passed."""
        duration = int(num_bytes * self._ns_per_byte)
        self.busy_ns += duration
        self.num_bytes += num_bytes
        if self._free_at > now:
            self.waited_ns += self._free_at - now
            now = self._free_at
        self._free_at = now + duration
        return self._free_at


def transfer(path: Sequence[Link], num_bytes: int, now: int) -> int:
    """When the last byte has passed the last link; the slowest or busiest link decides."""
    arrives = now
    for link in path:
        arrives = max(arrives, link.occupy(num_bytes, now))
    return arrives
