"""One global cache over a trace: which share of the prompts a cache of some size could reuse. Order of requests only, no time.

The prefix rule holds: reuse stops at the first block that is not there. A request's blocks are all there while it is served, as
leases keep them in a store node; when it ends, the policy, which is one of the store's, evicts until the rest fits. Belady's
bound looks into the future and counts block by block: no policy reuses more blocks. It knows no prefix rule.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from mooncake.core.errors import TraceError
from mooncake.store.eviction import EvictionPolicy
from mooncake.trace.types import TraceRequest

REFERENCES_MAX = 20_000_000
"""Of a trace whose future is kept in memory for Belady's bound: about 3 GB."""
BLOCK_SIZE = 1
"""Of a block as policies see it: all are of one size, and capacity is counted in blocks."""
KEY_BYTES = 16
"""As block keys have."""

_NEVER = np.iinfo(np.int64).max


class HitRate(msgspec.Struct, frozen=True):
    """Reuse over a whole trace, its cold start included. `by_token` is the one to quote: reused over input tokens."""

    num_requests: int
    num_references: int
    num_hits: int
    input_tokens: int
    hit_tokens: int
    sum_of_shares: float

    @property
    def by_token(self) -> float:
        return self.hit_tokens / self.input_tokens

    @property
    def by_block(self) -> float:
        return self.num_hits / self.num_references

    @property
    def per_request(self) -> float:
        """Mean of each request's share of reused tokens."""
        return self.sum_of_shares / self.num_requests


class PrefixCache:
    """capacity: blocks; None: nothing is ever evicted."""

    def __init__(self, policy: EvictionPolicy, capacity: int | None) -> None:
        self._policy = policy
        self._capacity = capacity
        self._rows: dict[int, int] = {}  # of the blocks that are here
        self._hash_ids: list[int] = []  # by row
        self._sizes: list[int] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def serve(self, hash_ids: Sequence[int]) -> int:
        """How many leading blocks are reused; afterwards all have been here, and what fits still is."""
        rows = self._rows
        num_matched = next((at for at, hash_id in enumerate(hash_ids) if hash_id not in rows), len(hash_ids))
        new = [hash_id for hash_id in hash_ids[num_matched:] if hash_id not in rows]
        self._policy.hold([rows[hash_id] for hash_id in hash_ids if hash_id in rows])
        if new:
            self._add(new, hash_ids)
        self._policy.idle([rows[hash_id] for hash_id in hash_ids])
        self._shrink()
        return num_matched

    def _add(self, hash_ids: Sequence[int], chain: Sequence[int]) -> None:
        rows = self._rows
        first, missing = len(self._hash_ids), max(0, len(hash_ids) - len(self._free))
        self._free += range(first, first + missing)
        self._hash_ids += [0] * missing
        self._sizes += [BLOCK_SIZE] * missing
        added = [self._free.pop() for _ in hash_ids]
        for row, hash_id in zip(added, hash_ids, strict=True):
            self._hash_ids[row] = hash_id
            rows[hash_id] = row
        keys = [hash_id.to_bytes(KEY_BYTES, "little", signed=True) for hash_id in hash_ids]
        before = dict(zip(chain[1:], chain, strict=False))
        parents = [rows[before[hash_id]] if hash_id in before else None for hash_id in hash_ids]
        self._policy.add(added, keys, self._sizes, parents)

    def _shrink(self) -> None:
        if self._capacity is not None and len(self._rows) > self._capacity:
            victims = self._policy.take((len(self._rows) - self._capacity) * BLOCK_SIZE, self._sizes)
            for row in victims:
                del self._rows[self._hash_ids[row]]
            self._free += victims


def hit_rate(
    requests: Iterable[TraceRequest], block_tokens: int, policy: EvictionPolicy, capacity: int | None
) -> HitRate | None:
    """policy: fresh; capacity: blocks. None without requests that have hash ids."""
    cache = PrefixCache(policy, capacity)
    num_requests = num_references = num_hits = input_tokens = hit_tokens = 0
    sum_of_shares = 0.0
    for request, hash_ids in _with_prefixes(requests):
        num_matched = cache.serve(hash_ids)
        reused = min(num_matched * block_tokens, request.input_length)
        num_requests += 1
        num_references += len(hash_ids)
        num_hits += num_matched
        input_tokens += request.input_length
        hit_tokens += reused
        sum_of_shares += reused / request.input_length
    if not num_requests:
        return None
    return HitRate(num_requests, num_references, num_hits, input_tokens, hit_tokens, sum_of_shares)


class Future:
    """When each block of a trace is wanted next, kept in memory."""

    def __init__(self, requests: Iterable[TraceRequest]) -> None:
        places: dict[int, int] = {}
        blocks: list[int] = []
        for _, hash_ids in _with_prefixes(requests):
            blocks.extend(places.setdefault(hash_id, len(places)) for hash_id in hash_ids)
            if len(blocks) > REFERENCES_MAX:
                raise TraceError(f"Belady's bound keeps the trace in memory, and takes up to {REFERENCES_MAX} blocks")
        self.num_blocks = len(places)
        self.num_references = len(blocks)
        self._blocks = np.array(blocks, dtype=np.int64)
        # Sorted by block and then place, each reference is followed by the next one to the same block.
        order = np.argsort(self._blocks, kind="stable")
        self._next_uses = np.full(len(blocks), _NEVER, dtype=np.int64)
        is_same = self._blocks[order[1:]] == self._blocks[order[:-1]]
        self._next_uses[order[:-1][is_same]] = order[1:][is_same]

    def belady(self, capacity: int | None) -> float:
        """Hit rate by block of the policy that evicts what is wanted last, and takes in nothing that is wanted later still."""
        if capacity is None or capacity >= self.num_blocks:
            return 1 - self.num_blocks / len(self._blocks)
        cached: dict[int, int] = {}  # block -> its next use
        latest: list[tuple[int, int]] = []  # (-next use, block), with entries that are out of date
        num_hits = 0
        for block, next_use in zip(self._blocks.tolist(), self._next_uses.tolist(), strict=True):
            if block in cached:
                num_hits += 1
            elif len(cached) >= capacity:
                while cached.get(latest[0][1]) != -latest[0][0]:
                    heapq.heappop(latest)
                if -latest[0][0] <= next_use:
                    continue
                del cached[heapq.heappop(latest)[1]]
            cached[block] = next_use
            heapq.heappush(latest, (-next_use, block))
        return num_hits / len(self._blocks)


def _with_prefixes(requests: Iterable[TraceRequest]) -> Iterator[tuple[TraceRequest, tuple[int, ...]]]:
    for request in requests:
        if request.hash_ids is not None:
            yield request, request.hash_ids
