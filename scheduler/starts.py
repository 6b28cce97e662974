"""When sequences begin to decode, in the past and as booked, for all decode instances together.

Time is cut into buckets; each holds what the sequences that begin in it add to a decode step, as long as they are
booked. What began before the window is forgotten, and what begins after it is taken to begin in its last bucket.
"""

from __future__ import annotations

from mooncake.core.types import NANOS_PER_MS

BUCKET_NS = 500 * NANOS_PER_MS
_NUM_PAST = 128
_NUM_BUCKETS = 256
"""64 seconds each way: longer than most sequences decode, and than anybody waits for a first token."""


class NoStarts:
    """Nobody asks."""

    def add(self, at_ns: int, step_ns: float) -> int:
        return 0

    def remove(self, bucket: int, step_ns: float) -> None:
        pass


class Starts:
    def __init__(self) -> None:
        self._begin = 0
        """Number of the first bucket of the window; bucket n is at n % _NUM_BUCKETS."""
        self._sums = [0.0] * _NUM_BUCKETS

    def add(self, at_ns: int, step_ns: float) -> int:
        """The number of its bucket, to be given again when it is taken off."""
        bucket = at_ns // BUCKET_NS
        if not self._begin <= bucket < self._begin + _NUM_BUCKETS:
            bucket = max(self._begin, min(bucket, self._begin + _NUM_BUCKETS - 1))
        self._sums[bucket % _NUM_BUCKETS] += step_ns
        return bucket

    def remove(self, bucket: int, step_ns: float) -> None:
        if bucket >= self._begin:
            self._sums[bucket % _NUM_BUCKETS] -= step_ns

    def pass_time(self, now: int) -> None:
        begin = now // BUCKET_NS - _NUM_PAST
        for bucket in range(self._begin, min(begin, self._begin + _NUM_BUCKETS)):
            self._sums[bucket % _NUM_BUCKETS] = 0.0
        self._begin = max(self._begin, begin)

    def between(self, after_ns: int, until_ns: int) -> float:
        """Of those that begin after the bucket of the one time and until the end of that of the other."""
        low = max(after_ns // BUCKET_NS + 1, self._begin)
        high = min(until_ns // BUCKET_NS + 1, self._begin + _NUM_BUCKETS)
        if low >= high:
            return 0.0
        at, end = low % _NUM_BUCKETS, (high - 1) % _NUM_BUCKETS + 1
        sums = self._sums
        return max(0.0, sum(sums[at:end]) if at < end else sum(sums[at:]) + sum(sums[:end]))
