"""What somebody has still to be told: keys gained and lost in one tier, net, under a sequence number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain


class Changes:
    """gained, lost: batches of keys, since the last report."""

    def __init__(self) -> None:
        self.seq = 0
        self.gained: list[Sequence[bytes]] = []
        self.lost: list[Sequence[bytes]] = []

    def note(self, gained: Sequence[bytes], lost: Sequence[bytes]) -> None:
        if gained:
            self.gained.append(gained)
        if lost:
            self.lost.append(lost)

    def forget(self) -> None:
        """Somebody was told in another way."""
        self.gained, self.lost = [], []

    def take(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Keys gained and lost. What came and went again, or the other way round, is neither."""
        if not self.gained and not self.lost:
            return (), ()
        gained, lost = tuple(chain.from_iterable(self.gained)), tuple(chain.from_iterable(self.lost))
        self.gained, self.lost = [], []
        if gained and lost and not set(gained).isdisjoint(lost):
            gained, lost = _net(gained, lost)
        self.seq += bool(gained or lost)
        return gained, lost


def _net(gained: tuple[bytes, ...], lost: tuple[bytes, ...]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Gains and losses of a key take turns, so one at most is left over."""
    count = Counter(gained)
    count.subtract(lost)
    return tuple([key for key in count if count[key] > 0]), tuple([key for key in count if count[key] < 0])
