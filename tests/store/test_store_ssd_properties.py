"""Random histories of a store with an SSD tier, against a model that keeps every byte of both tiers and every claim.

A disk does the core's jobs in any order, and badly at times. Whatever happens: what is leased is what was committed, what a job
reads does not change while it reads, what it writes is nobody's, both directories know what is there, and in the end all is
given back.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mooncake.core.types import Tier
from mooncake.store.core import StoreCore
from mooncake.store.events import (
    Cancel,
    ClientGone,
    Commit,
    Exists,
    Lease,
    ReadSsd,
    Release,
    Remove,
    Reply,
    Report,
    Request,
    Reserve,
    Snapshot,
    SnapshotWanted,
    SsdJob,
    SsdRead,
    SsdWritten,
    Tick,
    WriteSsd,
)
from mooncake.store.eviction import POLICIES
from mooncake.store.ssd import SsdConfig
from mooncake.store.ssd_layout import Entry, Page, merged, recovered
from mooncake.store.types import CommitStatus, Location, PutStatus
from tests.store.helpers import UNIT, by_key, key
from tests.store.ssd import TABLE_PAGES

CLIENTS = (1, 2, 3)
MEMORY = 12
NAMES = [key(number) for number in range(15)]
WEIGHTS = (6, 3, 4, 4, 1, 5, 5, 0.4, 0.3, 2, 0.3)
"""How often each of the things in `step` happens."""


def units(offset: int, size: int) -> range:
    return range(offset // UNIT, (offset + size - 1) // UNIT + 1)


class TieredHistory:
    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        extent_bytes = (TABLE_PAGES + rng.randrange(2, 6)) * UNIT
        self.config = SsdConfig(
            rng.randrange(2, 5) * extent_bytes,
            UNIT,
            extent_bytes,
            ready_bytes=rng.randrange(5) * UNIT,
            job_bytes=rng.randrange(1, 5) * UNIT,
            room_wait_ns=10,
            load_wait_ns=25,
        )
        self.pages: dict[int, Page] = {}
        self.num_crashes = 0
        self.start()
        self.now = 0
        self.last_request = 0
        self.ssd: dict[int, bytes] = {}

    def start(self) -> None:
        """A life of the node: nothing is left of the one before but what is on SSD."""
        self.core = StoreCore(
            MEMORY * UNIT,
            epoch=1,
            alignment=UNIT,
            policy=POLICIES[self.rng.choice(list(POLICIES))](),
            reservation_ns=60,
            report_ns=self.rng.randrange(3),
            ssd=self.config,
        )
        self.jobs: list[SsdJob] = []
        self.requests: dict[int, Request] = {}
        self.segment: dict[int, bytes] = {}
        self.reserved: dict[int, dict[int, tuple[bytes, Location]]] = {client: {} for client in CLIENTS}
        self.leased: dict[int, list[tuple[bytes, Location]]] = {client: [] for client in CLIENTS}
        self.directory: dict[Tier, set[bytes]] = {Tier.DRAM: set(), Tier.SSD: set()}
        self.seqs = {Tier.DRAM: 0, Tier.SSD: 0}

    def crash(self) -> None:
        """Jobs under way leave anything, and the next life finds all that was known to be on SSD."""
        known = dict(self.core._ssd.log.copies)
        self.start()
        self.num_crashes += 1
        geometry = self.config.geometry
        tables = [
            merged([self.pages[at] for at in range(first, first + geometry.table_bytes, UNIT) if at in self.pages])
            for first in range(0, geometry.capacity_bytes, geometry.extent_bytes)
        ]
        event = recovered(tables)
        assert set(known) <= set(event.keys)
        for name, size, offset in zip(event.keys, event.sizes, event.ssd_offsets, strict=True):
            assert {self.ssd[unit] for unit in units(offset, size)} == {name}
        self.tell(event)

    # ------------------------------------------------------------ the shell

    def tell(self, event: Any) -> Any:
        """The answer, if it came at once."""
        self.now += 1
        return self.carry_out(event)

    def carry_out(self, event: Any) -> Any:
        if isinstance(event, Request):
            self.requests[event.request_id] = event
        answer = None
        for command in self.core.handle(event, self.now):
            match command:
                case Reply():
                    request = self.requests.pop(command.request_id)
                    assert command.client == request.client
                    self.answered(request, command)
                    if request is event:
                        answer = by_key(command.results)
                case SsdJob():
                    self.begin_job(command)
                case Report():
                    self.report(command)
                case Snapshot():
                    assert set(command.keys) == self.directory[command.tier] and command.seq == self.seqs[command.tier]
                case _:
                    raise AssertionError(command)
        self.core.check_integrity()
        return answer

    def ask(self, kind: type[Request], client: int, *arguments: Any, **options: Any) -> Any:
        self.last_request += 1
        return self.tell(kind(client, self.last_request, *arguments, **options))

    def answered(self, request: Request, reply: Reply) -> None:
        results = by_key(reply.results)
        match request:
            case Reserve():
                for name, put in zip(request.keys, results, strict=True):
                    if put.status is PutStatus.RESERVED:
                        self.reserved[request.client][put.location.generation] = (name, put.location)
                        self.write(put.location, name)
                    elif put.status is PutStatus.EXISTS and request.lease_existing:
                        self.lease_to(request.client, name, put.location)
            case Lease():
                found = [location for location in results if location is not None]
                assert 0 <= reply.results.num_loaded <= len(found)
                for name, location in zip(request.keys, results, strict=True):
                    if location is not None:
                        self.lease_to(request.client, name, location)

    def lease_to(self, client: int, name: bytes, location: Location) -> None:
        self.leased[client].append((name, location))
        self.read(location, name)

    def write(self, location: Location, name: bytes) -> None:
        self.segment.update(dict.fromkeys(units(location.offset, location.size), name))

    def read(self, location: Location, name: bytes) -> None:
        assert {self.segment[unit] for unit in units(location.offset, location.size)} == {name}

    def begin_job(self, job: SsdJob) -> None:
        self.jobs.append(job)
        if isinstance(job, WriteSsd):
            for run in job.runs:
                if run.opens:
                    self.pages[run.extent * self.config.geometry.extent_bytes] = Page(run.sequence, ())
        for name, source, target in self.objects_of(job):
            contents, others = (self.segment, self.ssd) if isinstance(job, WriteSsd) else (self.ssd, self.segment)
            assert {contents[unit] for unit in source} == {name}
            others.update(dict.fromkeys(target, b""))  # torn until it is done

    def objects_of(self, job: SsdJob) -> Iterator[tuple[bytes, range, range]]:
        for name, size, offset, below in zip(job.keys, job.sizes, job.offsets, job.ssd_offsets, strict=True):
            if not size:
                continue
            here, there = units(offset, size), units(below, size)
            yield (name, here, there) if isinstance(job, WriteSsd) else (name, there, here)

    def report(self, report: Report) -> None:
        known = self.directory[report.tier]
        self.seqs[report.tier] += 1
        assert report.seq == self.seqs[report.tier]
        assert not set(report.added) & known and set(report.removed) <= known
        self.directory[report.tier] = known - set(report.removed) | set(report.added)

    def finish_job(self, fault: float = 0.0) -> None:
        if not self.jobs:
            return
        job = self.jobs.pop(self.rng.randrange(len(self.jobs)))
        bad = tuple([index for index in range(len(job.keys)) if self.rng.random() < fault])
        for index, (name, source, target) in enumerate(self.objects_of(job)):
            contents, others = (self.segment, self.ssd) if isinstance(job, WriteSsd) else (self.ssd, self.segment)
            assert {contents[unit] for unit in source} == {name}
            assert {others[unit] for unit in target} == {b""}
            if index not in bad:
                others.update(dict.fromkeys(target, name))
        if isinstance(job, WriteSsd):
            self.write_tables(job, bad)
        self.tell(SsdWritten(job.job, bad) if isinstance(job, WriteSsd) else SsdRead(job.job, bad))

    def write_tables(self, job: WriteSsd, bad: Sequence[int]) -> None:
        first = 0
        for run in job.runs:
            good = [at for at in range(first, first + run.count) if at not in bad]
            first += run.count
            entries = tuple([Entry(job.keys[at], job.ssd_offsets[at], job.sizes[at], 0) for at in good])
            before = self.pages.get(run.table_offset)
            assert before is None or before.sequence < run.sequence, "a page is written twice"
            self.pages[run.table_offset] = Page(run.sequence, entries)
        assert first == len(job.keys)

    # ------------------------------------------------------------ clients

    def step(self) -> None:
        """Something happens."""
        rng, client = self.rng, self.rng.choice(CLIENTS)
        flip = rng.random() < 0.5
        match rng.choices(range(len(WEIGHTS)), WEIGHTS)[0]:
            case 0:
                self.finish_job(fault=0.1)
            case 1:
                self.reserve(client, self.names(), rng.randrange(1, 4))
            case 2:
                self.commit(client, flip)
            case 3:
                self.reserve(client, self.names(), rng.randrange(1, 3), plain=True)
                self.commit(client, False)
            case 4:
                self.cancel(client)
            case 5:
                self.ask(Lease, client, tuple(rng.choices(NAMES, k=rng.randrange(1, 6))))
            case 6:
                self.release(client)
            case 7:
                self.remove(rng.choices(NAMES, k=rng.randrange(1, 3)))
            case 8:
                self.gone(client)
            case 9:
                self.time_passes(rng.randrange(30))
            case 10:
                self.tell(SnapshotWanted())
                (self.crash if rng.random() < 0.3 else self.core.check_integrity)()

    def names(self) -> tuple[bytes, ...]:
        return tuple(self.rng.sample(NAMES, self.rng.randrange(1, 6)))

    def reserve(self, client: int, names: tuple[bytes, ...], size: int, plain: bool = False) -> None:
        sizes = tuple(size * UNIT - at for at in range(len(names)))
        flags = ("lease_existing", "all_or_nothing", "ephemeral_last")
        self.ask(Reserve, client, names, sizes, **{flag: not plain and self.rng.random() < 0.5 for flag in flags})

    def commit(self, client: int, lease: bool) -> None:
        numbers = tuple(self.reserved[client])[: self.rng.randrange(1, 6)]
        if not numbers:
            return
        mine = [self.reserved[client].pop(number) for number in numbers]
        for (name, location), status in zip(mine, self.ask(Commit, client, numbers, lease), strict=True):
            if lease and status is CommitStatus.COMMITTED:
                self.lease_to(client, name, location)
            elif status is CommitStatus.EXISTS and lease:
                assert self.ask(Release, client, (location.generation,)) == (True,)

    def cancel(self, client: int) -> None:
        numbers = tuple(self.reserved[client])[: self.rng.randrange(1, 5)]
        if numbers:
            assert all(self.ask(Cancel, client, numbers))
            for number in numbers:
                del self.reserved[client][number]

    def release(self, client: int) -> None:
        count = self.rng.randrange(1, 9)
        batch, self.leased[client] = self.leased[client][:count], self.leased[client][count:]
        if batch:
            for name, location in batch:
                self.read(location, name)
            assert all(self.ask(Release, client, tuple(location.generation for _, location in batch)))

    def remove(self, names: Sequence[bytes]) -> None:
        there = {name for name in names if self.core._objects.by_key.get(name) is not None or self.core._ssd.has(name)}
        removed = dict(zip(reversed(names), reversed(self.ask(Remove, 1, tuple(names))), strict=True))
        assert {name for name in removed if removed[name]} == there
        assert not any(self.ask(Exists, 1, tuple(names)))

    def gone(self, client: int) -> None:
        self.tell(ClientGone(client))
        self.reserved[client], self.leased[client] = {}, []
        self.requests = {number: each for number, each in self.requests.items() if each.client != client}

    def time_passes(self, steps: int) -> None:
        end = self.now + steps
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.carry_out(Tick())
            assert (after := self.core.deadline()) is None or after > self.now
        self.now = max(self.now, end)

    # ------------------------------------------------------------ laws

    def check_owners(self) -> None:
        """Every range belongs to one claim or job."""
        held = {location.generation: units(location.offset, location.size)
                for client in CLIENTS
                for _, location in (*self.reserved[client].values(), *self.leased[client])}  # fmt: skip
        owned = [*held.values(), *(target for job in self.jobs if isinstance(job, ReadSsd)
                                   for _, _, target in self.objects_of(job))]  # fmt: skip
        counted = sorted(itertools.chain.from_iterable(owned))
        assert len(counted) == len(set(counted)), "two owners of one place in memory"
        below = [unit for job in self.jobs if isinstance(job, WriteSsd) for *_, target in self.objects_of(job)
                 for unit in target]  # fmt: skip
        assert len(below) == len(set(below)), "two writes to one place on SSD"

    def end(self) -> None:
        """Everything is given back."""
        for client in CLIENTS:
            self.gone(client)
        while self.jobs:
            self.finish_job()
        self.time_passes(100)
        metrics = self.core.metrics()
        assert metrics["reservations"] == metrics["leases"] == metrics["waiting"] == metrics["ssd_jobs"] == 0
        assert metrics["used_bytes"] == metrics["evictable_bytes"]
        assert metrics["ssd_used_bytes"] == metrics["ssd_evictable_bytes"]
        assert self.core.deadline() is None


def run(seed: int) -> Counter[str]:
    history = TieredHistory(seed)
    for _ in range(400):
        history.step()
        history.check_owners()
    history.end()
    return Counter(history.core.metrics() | {"crashes": history.num_crashes})


def test_two_tiers_hold_their_laws() -> None:
    happened: Counter[str] = Counter()
    for seed in range(60):
        happened += run(seed)
    assert happened["ssd_reads"] > 200
    assert happened["crashes"] > 30 and happened["ssd_recovered"] > 50
    for rare in ("ssd_writes", "ssd_evictions", "lost_evictions", "ssd_write_errors", "ssd_read_errors", "refusals"):
        assert happened[rare] > 20, rare


def test_the_model_is_not_blind() -> None:
    """It sees a range that changes under a write."""
    history = TieredHistory(1)
    while not any(isinstance(job, WriteSsd) for job in history.jobs):
        history.step()
    history.jobs = [job for job in history.jobs if isinstance(job, WriteSsd)][:1]
    history.segment[history.jobs[0].offsets[0] // UNIT] = b"changed"
    with pytest.raises(AssertionError):
        history.finish_job()
