"""What an instance tells the Conductor: who it is, its load, and which blocks its pages hold.

Reports are numbered within the instance's epoch. A new connection starts with registration and a snapshot; the Conductor
asks for another snapshot when it sees a gap.
"""

from __future__ import annotations

import msgspec

from mooncake.core.messages import (
    CONDUCTOR,
    AnyMessage,
    CacheDelta,
    CacheSnapshot,
    LoadReport,
    Register,
    Registered,
    Send,
    SnapshotRequest,
    StateChange,
)
from mooncake.core.types import NANOS_PER_MS, InstanceInfo, InstanceLoad, InstanceState, Tier
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.core import EngineLoad

REPORT_NS = 50 * NANOS_PER_MS
"""Load changes are told at most this often; placement bridges the time between with its own bookings."""


class InstanceReporter:
    """Sans-IO. Keeps a copy of the cached keys, so that a snapshot needs no answer from the engine thread."""

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.refused: str | None = None
        """Why the Conductor refused the registration."""
        self._load = EngineLoad(0, 0, 0, 0, info.num_pages)
        self._step_ns = 0
        self._load_seq = 0
        self._cache_seq = 0
        self._keys: dict[bytes, None] = {}
        self._report_at: int | None = None
        self._last_report = -REPORT_NS
        self._connected = False

    def opened(self, num_queued: int, queued_tokens: int, now: int) -> list[Send]:
        self._connected = True
        return [self._send(Register(self.info)), self._snapshot(), *self._report(num_queued, queued_tokens, now)]

    def closed(self) -> None:
        self._connected = False

    def received(self, message: AnyMessage) -> list[Send]:
        if isinstance(message, SnapshotRequest):
            return [self._snapshot()]
        if isinstance(message, Registered):
            self.refused = None if message.accepted else message.detail
        return []

    def progress(self, event: EngineProgress, now: int) -> list[Send]:
        self._load = event.load
        if event.step_ns:
            self._step_ns = event.step_ns if not self._step_ns else (3 * self._step_ns + event.step_ns) // 4
        self.touch(now)
        if not event.blocks_added and not event.blocks_removed:
            return []
        self._keys.update(dict.fromkeys(event.blocks_added))
        for key in event.blocks_removed:
            self._keys.pop(key, None)
        self._cache_seq += 1
        delta = CacheDelta(
            self.info.name, self.info.epoch, self._cache_seq, Tier.HBM, event.blocks_added, event.blocks_removed
        )
        return [self._send(delta)] if self._connected else []

    def touch(self, now: int) -> None:
        """The load changed: a report is due, at once or REPORT_NS after the last one."""
        if self._report_at is None:
            self._report_at = max(now, self._last_report + REPORT_NS)

    def change_state(self, state: InstanceState) -> list[Send]:
        self.info = msgspec.structs.replace(self.info, state=state)
        change = StateChange(self.info.name, self.info.epoch, state, self.info.cost)
        return [self._send(change)] if self._connected else []

    def deadline(self) -> int | None:
        return self._report_at if self._connected else None

    def tick(self, num_queued: int, queued_tokens: int, now: int) -> list[Send]:
        """num_queued, queued_tokens: what waits in the core, before the engine."""
        if not self._connected or self._report_at is None or self._report_at > now:
            return []
        return self._report(num_queued, queued_tokens, now)

    def _report(self, num_queued: int, queued_tokens: int, now: int) -> list[Send]:
        self._load_seq += 1
        self._last_report = now
        self._report_at = None
        load = self._load
        return [
            self._send(
                LoadReport(
                    InstanceLoad(
                        name=self.info.name,
                        epoch=self.info.epoch,
                        seq=self._load_seq,
                        num_waiting=num_queued + load.num_waiting,
                        waiting_tokens=queued_tokens + load.waiting_tokens,
                        num_running=load.num_running,
                        context_tokens=load.context_tokens,
                        free_pages=load.free_pages,
                        step_ns=self._step_ns,
                    )
                )
            )
        ]

    def _snapshot(self) -> Send:
        return self._send(CacheSnapshot(self.info.name, self.info.epoch, self._cache_seq, Tier.HBM, tuple(self._keys)))

    @staticmethod
    def _send(message: AnyMessage) -> Send:
        return Send(CONDUCTOR, message)
