"""How fast something that only grows does so, over the last seconds."""

from __future__ import annotations

from mooncake.core.types import NANOS_PER_S

WINDOW_NS = 5 * NANOS_PER_S


class Throughput:
    """Remembers what was counted at two times, so that a rate is over one to two windows, or all of a shorter time. After a
    window in which nothing was told it begins anew."""

    __slots__ = ("_before", "_latest", "_middle")

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None
        self._middle = self._latest = (0, 0)

    def note(self, total: int, now: int) -> None:
        last_total, last_at = self._latest
        if self._before is None or total < last_total or now - last_at >= WINDOW_NS:
            self._before = self._middle = (total, now)
        elif now - self._middle[1] >= WINDOW_NS:
            self._before, self._middle = self._middle, (total, now)
        self._latest = (total, now)

    def per_s(self, now: int) -> float:
        if self._before is None or now - self._latest[1] >= WINDOW_NS:
            return 0.0
        total, since = self._before
        return (self._latest[0] - total) * NANOS_PER_S / max(now - since, NANOS_PER_S)
