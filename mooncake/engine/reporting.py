"""What an instance tells the Conductor: who it is, its load, and which blocks its pages hold.

Reports are numbered within the instance's epoch. A new connection starts with registration. The Conductor then asks for a
snapshot of the blocks, and again when it sees a gap; only the engine knows them all.
"""

from __future__ import annotations

import msgspec

from mooncake.core.messages import (
    CONDUCTOR,
    AnyMessage,
    CacheDelta,
    CacheSnapshot,
    Hold,
    LoadReport,
    Register,
    Registered,
    Send,
    SnapshotRequest,
    StateChange,
)
from mooncake.core.types import NANOS_PER_MS, InstanceInfo, InstanceLoad, InstanceState, Tier
from mooncake.engine.attempts import EngineProgress, ListBlocks
from mooncake.engine.core import EngineLoad
from mooncake.store.reports import Changes

REPORT_NS = 50 * NANOS_PER_MS
"""A change is told so much later, with all that came until then: a request changes an instance's load and blocks several times
in a row. Placement bridges the time between with its own bookings and predictions. That a job has come is no news to it."""


class InstanceReporter:
    """Sans-IO."""

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.refused: str | None = None
        """Why the Conductor refused the registration."""
        self._load = EngineLoad(0, 0, 0, 0, info.num_pages)
        self._step_ns = 0
        self._load_seq = 0
        self._changes = Changes()
        """Of the cached blocks, since the last report or snapshot."""
        self._report_at: int | None = None
        self._num_told = 0
        """Attempts in the last report."""
        self._connected = False

    def opened(self, num_queued: int, queued_tokens: int, num_attempts: int) -> list[Send]:
        self._connected = True
        return [_send(Register(self.info)), self._load_report(num_queued, queued_tokens, num_attempts)]

    def closed(self) -> None:
        self._connected = False
        self._changes.forget()  # the next connection gets a snapshot

    def received(self, message: AnyMessage) -> list[ListBlocks]:
        if isinstance(message, SnapshotRequest):
            return [ListBlocks()]
        if isinstance(message, Registered):
            self.refused = None if message.accepted else message.detail
        if isinstance(message, Hold):
            self.info = msgspec.structs.replace(self.info, held=message.held)
        return []

    def progress(self, event: EngineProgress, now: int) -> list[Send]:
        self._load = event.load
        if event.step_ns:
            self._step_ns = event.step_ns if not self._step_ns else (3 * self._step_ns + event.step_ns) // 4
        if self._connected:
            self._changes.note(event.blocks_added, event.blocks_removed)
        self.touch(now)
        return [] if event.cached is None else [self._snapshot(event.cached)]

    def touch(self, now: int) -> None:
        """The load changed: a report is due."""
        if self._report_at is None:
            self._report_at = now + REPORT_NS

    def count(self, num_attempts: int, now: int) -> None:
        """Attempts that are not over. A held instance tells when their number changes: somebody waits for the last to go."""
        if self.info.held and num_attempts != self._num_told:
            self.touch(now)

    def change_state(self, state: InstanceState) -> list[Send]:
        self.info = msgspec.structs.replace(self.info, state=state)
        change = StateChange(self.info.name, self.info.epoch, state, self.info.cost)
        return [_send(change)] if self._connected else []

    def deadline(self) -> int | None:
        return self._report_at if self._connected else None

    def due(self, now: int) -> bool:
        return self._report_at is not None and self._report_at <= now and self._connected

    def report(self, num_queued: int, queued_tokens: int, num_attempts: int) -> list[Send]:
        """num_queued, queued_tokens: what waits in the core, before the engine. num_attempts: all that are not over."""
        load = self._load_report(num_queued, queued_tokens, num_attempts)
        added, removed = self._changes.take()
        if not added and not removed:
            return [load]
        return [_send(CacheDelta(self.info.name, self.info.epoch, self._changes.seq, Tier.HBM, added, removed)), load]

    def _load_report(self, num_queued: int, queued_tokens: int, num_attempts: int) -> Send:
        self._load_seq += 1
        self._num_told = num_attempts
        self._report_at = None
        load = self._load
        return _send(
            LoadReport(
                InstanceLoad(
                    self.info.name,
                    self.info.epoch,
                    self._load_seq,
                    num_queued + load.num_waiting,
                    queued_tokens + load.waiting_tokens,
                    load.num_running,
                    load.context_tokens,
                    load.free_pages,
                    self._step_ns,
                    queued_tokens + load.waiting_context,
                    num_attempts,
                    load.num_computed_tokens,
                    load.reused,
                )
            )
        )

    def _snapshot(self, keys: tuple[bytes, ...]) -> Send:
        """keys: all that are cached; it contains what was not reported yet."""
        self._changes.forget()
        return _send(CacheSnapshot(self.info.name, self.info.epoch, self._changes.seq, Tier.HBM, keys))


def _send(message: AnyMessage) -> Send:
    return Send(CONDUCTOR, message)
