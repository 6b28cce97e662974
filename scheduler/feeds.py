"""Numbered cache reports into the prefix index: duplicates are dropped, a gap asks for a snapshot.

Each (holder, tier) is a stream of its own with its own sequence. Until the first snapshot, a stream may begin with
delta 0 or 1, before which there was nothing; any other beginning is a gap.
"""

from __future__ import annotations

from mooncake.core.messages import CacheDelta, CacheSnapshot, Send, SnapshotRequest
from mooncake.core.types import Tier
from mooncake.scheduler.prefix_index import IN_FAST, IN_SLOW, PrefixIndex

_FLAGS = {Tier.HBM.value: IN_FAST, Tier.DRAM.value: IN_FAST, Tier.SSD.value: IN_SLOW}
_FIRST_SEQ_MAX = 1


class _Holder:
    __slots__ = ("epoch", "seqs", "slot")

    def __init__(self, slot: int, epoch: int) -> None:
        self.slot = slot
        self.epoch = epoch
        self.seqs: dict[str, int] = {}
        """Last applied sequence number by tier."""


class CacheFeeds:
    def __init__(self, index: PrefixIndex, retry_ns: int) -> None:
        self._index = index
        self._retry_ns = retry_ns
        self._holders: dict[str, _Holder] = {}
        self.asked: dict[tuple[str, str], int] = {}
        """When a snapshot of (holder, tier) was asked for that has not come; oldest first."""
        self.num_stale = 0
        self.num_gaps = 0

    def open(self, name: str, epoch: int, slot: int, tier: Tier, now: int) -> list[Send]:
        """A holder registered, for the first time or again: ask for what it has, since reports may have been missed."""
        holder = self._holders.get(name)
        if holder is None or holder.slot != slot:
            self._holders[name] = _Holder(slot, epoch)
        return [self._ask(name, tier.value, now)]

    def close(self, name: str) -> None:
        del self._holders[name]
        for tier in _FLAGS:
            self.asked.pop((name, tier), None)

    def on_delta(self, delta: CacheDelta, now: int) -> list[Send]:
        holder = self._holder(delta)
        if holder is None:
            return []
        seen = holder.seqs.get(delta.tier)
        if seen is not None and delta.seq <= seen:
            self.num_stale += 1
            return []
        if delta.seq > (_FIRST_SEQ_MAX if seen is None else seen + 1):
            self.num_gaps += 1
            return [] if (delta.holder, delta.tier) in self.asked else [self._ask(delta.holder, delta.tier, now)]
        holder.seqs[delta.tier] = delta.seq
        if delta.removed:
            self._index.discard(holder.slot, _FLAGS[delta.tier], delta.removed)
        if delta.added:
            self._index.add(holder.slot, _FLAGS[delta.tier], delta.added)
        return []

    def on_snapshot(self, snapshot: CacheSnapshot) -> None:
        holder = self._holder(snapshot)
        if holder is None:
            return
        if snapshot.seq < holder.seqs.get(snapshot.tier, 0):
            self.num_stale += 1
            return
        holder.seqs[snapshot.tier] = snapshot.seq
        self.asked.pop((snapshot.holder, snapshot.tier), None)
        self._index.replace(holder.slot, _FLAGS[snapshot.tier], snapshot.keys)

    def retry(self, now: int) -> list[Send]:
        """Ask again for snapshots that did not come."""
        due = [stream for stream, asked_at in self.asked.items() if asked_at + self._retry_ns <= now]
        return [self._ask(name, tier, now) for name, tier in due]

    def deadline(self) -> int | None:
        return next(iter(self.asked.values())) + self._retry_ns if self.asked else None

    def _holder(self, report: CacheDelta | CacheSnapshot) -> _Holder | None:
        """The holder of a report, or None if it is unknown, of another life, or names an unknown tier."""
        holder = self._holders.get(report.holder)
        if holder is None or holder.epoch != report.epoch or report.tier not in _FLAGS:
            self.num_stale += 1
            return None
        return holder

    def _ask(self, name: str, tier: str, now: int) -> Send:
        self.asked.pop((name, tier), None)
        self.asked[name, tier] = now
        return Send(name, SnapshotRequest(name, tier))
