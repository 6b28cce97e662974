"""How prompts share prefixes: a tree that grows by one path per request.

A request's *donor* is the latest earlier request that has the deepest block the two share. A `Step` says how the tree grew by
one request of a real trace: how deep the shared prefix was, how long ago the donor came, how long the donor was, how much of it
others had used before, and how much of the prefix others have used since. `PrefixTree` repeats a step in another tree: among
the requests that came about as long ago it looks for the one that is most like the donor, shares as many blocks with it, and
goes on with new ones.

So depths, and with them the hit rate of an infinite cache, are those of the steps; which blocks are used once or often follows
from the likeness of donors; and hit rates of finite caches from how long ago each block of a prefix was used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import takewhile

import msgspec
import numpy as np

from mooncake.trace.types import TraceRequest

SPREAD = 1.3
"""Donors are sought between lag / SPREAD and lag * SPREAD requests ago."""
MARGIN = 32
"""And this many requests further, so that a short lag has candidates."""
WINDOW_MAX = 4096
"""Requests looked at for one donor, around the lag."""
CANDIDATES = 64
"""Of these, the ones whose blocks are looked at."""
HISTORY_MAX = 1 << 17
"""Requests that can be donors, the latest ones, up to twice as many: some 100 MB for prompts of 25 blocks."""
REFERENCES_MAX = 20_000_000
"""Blocks of all requests that can be donors."""
STALE = 10.0
"""Added to the distance of a candidate of which all that is to be shared was used again since: it would not be the donor."""


class Step(msgspec.Struct, frozen=True, gc=False):
    """How one request grew the tree. depth: leading blocks shared with the donor, 0 without one; lag: requests since the
    donor; donor_depth: leading blocks that the donor shared with any request before this one; num_fresher: leading blocks that
    a request since the donor had too."""

    input_length: int
    output_length: int
    num_blocks: int
    depth: int = 0
    lag: int = 0
    donor_blocks: int = 0
    donor_depth: int = 0
    num_fresher: int = 0


def steps_of(requests: Iterable[TraceRequest]) -> Iterator[Step]:
    """Of a trace. Without hash ids nothing is shared."""
    latest_use: dict[int, int] = {}
    num_blocks: list[int] = []
    depths: list[int] = []  # leading blocks shared with any request so far
    for number, request in enumerate(requests):
        hash_ids = request.hash_ids or ()
        depth = sum(1 for _ in takewhile(latest_use.__contains__, hash_ids))
        lengths = request.input_length, request.output_length, len(hash_ids)
        if depth:
            donor = latest_use[hash_ids[depth - 1]]
            fresher = _num_fresher(hash_ids, depth, donor, latest_use)
            yield Step(*lengths, depth, number - donor, num_blocks[donor], depths[donor], fresher)
            depths[donor] = max(depths[donor], depth)
        else:
            yield Step(*lengths)
        num_blocks.append(len(hash_ids))
        depths.append(depth)
        latest_use.update(dict.fromkeys(hash_ids, number))


class PrefixTree:
    """Grows by steps. Remembers the latest requests only; a step whose donor is further back takes an older one of these."""

    def __init__(self) -> None:
        self._next_id = 0
        self._base = 0  # number of the oldest request that is remembered
        self._paths: list[tuple[int, ...]] = []
        self._num_references = 0
        self._num_blocks = np.zeros(2 * HISTORY_MAX, dtype=np.int64)
        self._depths = np.zeros(2 * HISTORY_MAX, dtype=np.int64)
        self._latest_use: dict[int, int] = {}

    def grow(self, step: Step) -> tuple[tuple[int, ...], int]:
        """The new request's blocks, and how many of them it shares: less than step.depth only where nobody has as many."""
        prefix: tuple[int, ...] = ()
        if step.depth and self._paths:
            donor = self._find_donor(step)
            prefix = self._paths[donor][: step.depth]
            self._depths[donor] = max(self._depths[donor], len(prefix))
        end = self._next_id + step.num_blocks - len(prefix)
        path = (*prefix, *range(self._next_id, end))
        self._next_id = end
        self._remember(path, len(prefix))
        return path, len(prefix)

    def _find_donor(self, step: Step) -> int:
        """Its place among those remembered."""
        candidates = self._eligible(step)
        if not len(candidates):
            return int(np.argmax(self._num_blocks[: len(self._paths)]))
        lags = len(self._paths) - candidates
        distances = _log_distance(lags, step.lag) + _log_distance(self._num_blocks[candidates], step.donor_blocks)
        shared = np.minimum(self._depths[candidates], step.depth)
        distances += _log_distance(shared + 1, min(step.donor_depth, step.depth) + 1)
        nearest = np.argsort(distances, kind="stable")[:CANDIDATES]
        totals = [
            (distance + self._distance_of_use(place, step), place)
            for place, distance in zip(candidates[nearest].tolist(), distances[nearest].tolist(), strict=True)
        ]
        return int(min(totals, key=lambda each: each[0])[1])

    def _eligible(self, step: Step) -> np.ndarray:
        """Places of requests that are long enough and came about as long ago; further from that if there are none."""
        size = len(self._paths)
        lag = min(step.lag, size)
        margin = MARGIN
        while True:
            reach = WINDOW_MAX // 2 + margin
            low = max(0, size - min(int(lag * SPREAD) + margin, lag + reach))
            high = min(size, size - max(int(lag / SPREAD) - margin, lag - reach))
            found = low + np.flatnonzero(self._num_blocks[low:high] >= step.depth)
            if len(found) or (low == 0 and high == size):
                return found
            margin *= 2

    def _distance_of_use(self, place: int, step: Step) -> float:
        """How unlike the uses since then are to those of the step's prefix."""
        fresher = _num_fresher(self._paths[place], step.depth, self._base + place, self._latest_use)
        if fresher == step.depth:
            return STALE
        return abs(float(np.log((fresher + 1) / (step.num_fresher + 1))))

    def _remember(self, path: tuple[int, ...], depth: int) -> None:
        size = len(self._paths)
        self._num_blocks[size] = len(path)
        self._depths[size] = depth
        self._paths.append(path)
        self._num_references += len(path)
        self._latest_use.update(dict.fromkeys(path, self._base + size))
        if size + 1 == 2 * HISTORY_MAX or self._num_references > REFERENCES_MAX:
            self._forget((size + 1) // 2)

    def _forget(self, number: int) -> None:
        """The oldest ones."""
        gone, self._paths = self._paths[:number], self._paths[number:]
        self._base += number
        kept = len(self._paths)
        for array in (self._num_blocks, self._depths):
            array[:kept] = array[number : number + kept].copy()
        for path in gone:
            self._num_references -= len(path)
            for block in path:
                if self._latest_use.get(block, self._base) < self._base:
                    del self._latest_use[block]


def _num_fresher(path: tuple[int, ...], depth: int, donor: int, latest_use: dict[int, int]) -> int:
    """Leading blocks, of the first `depth`, that somebody after `donor` used. What uses a block uses those before it too, so
    they come first."""
    return bisect_left(range(depth), True, key=lambda at: latest_use[path[at]] == donor)


def _log_distance(values: np.ndarray, wanted: int) -> np.ndarray:
    return np.abs(np.log(values / max(1, wanted)))
