"""A disk for a store core with an SSD tier: it does the core's jobs on real bytes when the test says so."""

from __future__ import annotations

from typing import Any

from mooncake.store.core import StoreCore
from mooncake.store.events import ReadSsd, Reply, SsdJob, SsdRead, SsdWritten, WriteSsd
from mooncake.store.ssd import SsdConfig
from mooncake.store.types import Location, Places
from tests.store.helpers import UNIT, Driver, by_key

ROOM_WAIT, LOAD_WAIT = 100, 1000
TABLE_PAGES = 16


def tiered(memory: int, ssd: int, **options: Any) -> Tiered:
    """Room for so many objects of one unit in each tier, on SSD `extent` of them in each extent. ready: objects that are
    kept ready, 0."""
    in_extent = options.pop("extent", 1)
    extent_bytes = (TABLE_PAGES + in_extent) * UNIT
    config = SsdConfig(
        capacity_bytes=ssd // in_extent * extent_bytes,
        alignment=UNIT,
        extent_bytes=extent_bytes,
        ready_bytes=options.pop("ready", 0) * UNIT,
        job_bytes=options.pop("job", 100) * UNIT,
        room_wait_ns=ROOM_WAIT,
        load_wait_ns=LOAD_WAIT,
    )
    return Tiered(StoreCore(memory * UNIT, epoch=7, alignment=UNIT, ssd=config, **({"report_ns": 0} | options)))


class Tiered(Driver):
    """jobs: those not done, oldest first. answers: by request number, of calls that had to wait. segment, ssd: contents by
    offset."""

    def __init__(self, core: StoreCore) -> None:
        super().__init__(core)
        self.jobs: list[SsdJob] = []
        self.answers: dict[int, Any] = {}
        self.num_loaded: dict[int, int] = {}
        self.segment: dict[int, bytes] = {}
        self.ssd: dict[int, bytes] = {}

    def __call__(self, event: Any) -> Any:
        """The answer to the event itself, or None if it waits; any others are kept in `answers`."""
        answer = None
        own = (getattr(event, "client", None), getattr(event, "request_id", None))
        for command in self.core.handle(event, self.now):
            if isinstance(command, SsdJob):
                self.jobs.append(command)
            elif isinstance(command, Reply):
                result = by_key(command.results)
                if isinstance(command.results, Places):
                    self.num_loaded[command.request_id] = command.results.num_loaded
                if (command.client, command.request_id) == own:
                    answer = result
                else:
                    self.answers[command.request_id] = result
            elif hasattr(command, "client"):
                answer = command
            else:
                self.reports.append(command)
        self.core.check_integrity()
        return answer

    def write(self, location: Location, contents: bytes) -> None:
        self.segment[location.offset] = contents

    def do(self, at: int = 0, failed: tuple[int, ...] = ()) -> SsdJob:
        """One of the jobs that are not done."""
        job = self.jobs.pop(at)
        for index, (offset, ssd_offset) in enumerate(zip(job.offsets, job.ssd_offsets, strict=True)):
            if index in failed:
                continue
            if isinstance(job, WriteSsd):
                self.ssd[ssd_offset] = self.segment.get(offset, b"")
            else:
                self.segment[offset] = self.ssd[ssd_offset]
        event = SsdWritten(job.job, failed) if isinstance(job, WriteSsd) else SsdRead(job.job, failed)
        assert isinstance(job, WriteSsd | ReadSsd)
        self(event)
        return job

    def do_all(self) -> None:
        while self.jobs:
            self.do()
