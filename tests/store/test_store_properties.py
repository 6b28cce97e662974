"""Random histories: the allocator against a map of bytes, the core against a model, frames against themselves."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mooncake.core.errors import ProtocolError
from mooncake.store import wire
from mooncake.store.allocator import Allocator
from mooncake.store.core import StoreCore
from mooncake.store.events import (
    Cancel,
    ClientGone,
    Commit,
    Exists,
    Grant,
    Lease,
    Name,
    Release,
    Remove,
    Report,
    Request,
    Reserve,
    SnapshotWanted,
    Tick,
)
from mooncake.store.eviction import POLICIES
from mooncake.store.types import CommitStatus, Location, PutMode, PutStatus
from mooncake.transport.frames import Frame, FrameReader
from tests.store.helpers import UNIT, Driver, key

CLIENTS = (1, 2, 3)
KEYS = st.lists(st.integers(0, 9).map(key), min_size=1, max_size=5, unique=True).map(tuple)


def longest_gap(used: dict[int, int]) -> int:
    edges = sorted([(0, 0), *((offset, offset + size) for offset, size in used.items()), (40 * UNIT, 0)])
    return max(start - end for (_, end), (start, _) in itertools.pairwise(edges))


@given(st.lists(st.one_of(st.integers(1, 1700), st.integers(-20, 0)), max_size=120))
@settings(max_examples=60, deadline=None)
def test_allocator_never_overlaps_and_gives_everything_back(steps: list[int]) -> None:
    allocator = Allocator(40 * UNIT, UNIT)
    used: dict[int, int] = {}
    for step in steps:
        if step > 0:
            size, count = allocator.rounded(step % 500 + 1), step // 500 + 1
            offsets = allocator.allocate(size, count)
            used.update(dict.fromkeys(offsets, size))
            assert len(offsets) == count or longest_gap(used) < size
        elif used:
            offset = list(used)[step % len(used)]
            allocator.free(used.pop(offset), (offset,))
        allocator.check_integrity(used)
    for offset, size in used.items():
        allocator.free(size, (offset,))
    assert allocator.allocate(40 * UNIT, 1) == [0]


class StoreHistory(RuleBasedStateMachine):
    """The model keeps what each client was told it holds, and the bytes it wrote: no two live claims of different
    objects may overlap, a lease must find what was committed, and the directory's picture must equal the store's.

    A key may have several writers. Which objects are committed, and which are pinned under a loser's number, is modelled
    too: an alias must keep its winner's bytes as they are until it is released."""

    @initialize(
        reservation_ns=st.sampled_from([5, 1000]),
        report_ns=st.sampled_from([0, 3]),
        policy=st.sampled_from(list(POLICIES)),
    )
    def begin(self, reservation_ns: int, report_ns: int, policy: str) -> None:
        options = {"reservation_ns": reservation_ns, "report_ns": report_ns, "policy": POLICIES[policy]()}
        self.core = StoreCore(12 * UNIT, epoch=1, alignment=UNIT, **options)
        self.drive = Driver(self.core)
        self.reserved: dict[int, dict[int, Location]] = {client: {} for client in CLIENTS}
        self.leased: dict[int, list[Location]] = {client: [] for client in CLIENTS}
        self.elsewhere: dict[int, dict[int, Location]] = {client: {} for client in CLIENTS}  # own number -> the winner
        self.contents: dict[int, bytes] = {}  # number -> the key it was written for
        self.committed: dict[bytes, Location] = {}  # key -> the last winner
        self.segment = [0] * 12  # unit -> number of whoever wrote it last
        self.directory: set[bytes] = set()
        self.seq = 0

    def ask(self, event: Any) -> Any:
        self.drive.now += 1
        return self.drive(event)

    @rule(client=st.sampled_from(CLIENTS), keys=KEYS, units=st.integers(1, 4), flags=st.tuples(*[st.booleans()] * 3))
    def reserve(self, client: int, keys: tuple[bytes, ...], units: int, flags: tuple[bool, bool, bool]) -> None:
        lease, whole, ephemeral = flags
        sizes = tuple(units * UNIT - at for at in range(len(keys)))
        puts = self.ask(
            Reserve(client, 0, keys, sizes, lease_existing=lease, all_or_nothing=whole, ephemeral=ephemeral)
        )
        refused = [put.status is PutStatus.REFUSED for put in puts]
        assert not whole or all(refused) or not any(refused)
        for put, name in zip(puts, keys, strict=True):
            if put.status is PutStatus.RESERVED:
                self.reserved[client][put.location.generation] = put.location
                self.contents[put.location.generation] = name
                self.write(put.location)
            elif put.status is PutStatus.EXISTS and lease:
                self.leased[client].append(put.location)
                self.read(put.location, name)

    @rule(
        name=st.integers(0, 9).map(key), ephemeral=st.booleans(), order=st.permutations(CLIENTS), leases=st.booleans()
    )
    def race(self, name: bytes, ephemeral: bool, order: list[int], leases: bool) -> None:
        """Random batches seldom write the same key at once; here two clients do, and all commit what they have."""
        for client in order[:2]:
            self.reserve(client, (name,), 1, (True, False, ephemeral))
        for client in reversed(order):
            self.commit(client, leases, 4)

    @rule(client=st.sampled_from(CLIENTS), lease=st.booleans(), count=st.integers(1, 4))
    def commit(self, client: int, lease: bool, count: int) -> None:
        numbers = tuple(self.reserved[client])[:count]
        if not numbers:
            return
        for number in numbers:
            self.write(self.reserved[client][number])  # a late writer of an expired reservation writes too
        names = tuple(dict.fromkeys(self.contents[number] for number in numbers))
        there = dict(zip(names, self.ask(Exists(client, 0, names)), strict=True))
        for number, status in zip(numbers, self.ask(Commit(client, 0, numbers, lease)), strict=True):
            location, name = self.reserved[client].pop(number), self.contents[number]
            if status is CommitStatus.EXPIRED:
                continue
            assert status is (CommitStatus.EXISTS if there[name] else CommitStatus.COMMITTED)
            if status is CommitStatus.COMMITTED:
                self.committed[name] = location
                # an ephemeral object that nobody leases lives until the end of the batch that commits it
                there[name] = True
                if lease:
                    self.leased[client].append(location)
            elif lease:
                self.elsewhere[client][number] = self.committed[name]
                self.read(self.committed[name], name)

    @rule(client=st.sampled_from(CLIENTS), count=st.integers(1, 4))
    def cancel(self, client: int, count: int) -> None:
        numbers = tuple(self.reserved[client])[:count]
        if numbers:
            assert all(self.ask(Cancel(client, 0, numbers)))
            for number in numbers:
                del self.reserved[client][number]

    @rule(client=st.sampled_from(CLIENTS), keys=KEYS)
    def lease(self, client: int, keys: tuple[bytes, ...]) -> None:
        for name, result in zip(keys, self.ask(Lease(client, 0, keys)), strict=True):
            if result is not None:
                self.leased[client].append(result)
                self.read(result, name)

    @rule(client=st.sampled_from(CLIENTS), count=st.integers(1, 6))
    def release(self, client: int, count: int) -> None:
        batch, self.leased[client] = self.leased[client][:count], self.leased[client][count:]
        if batch:
            for location in batch:
                self.read(location, self.contents[location.generation])
            assert all(self.ask(Release(client, 0, tuple(location.generation for location in batch))))

    @rule(client=st.sampled_from(CLIENTS), count=st.integers(1, 4))
    def release_by_alias(self, client: int, count: int) -> None:
        numbers = tuple(self.elsewhere[client])[:count]
        if not numbers:
            return
        for number in numbers:
            winner = self.elsewhere[client].pop(number)
            self.read(winner, self.contents[number])
        assert all(self.ask(Release(client, 0, numbers)))
        assert not any(self.ask(Release(client, 0, numbers)))

    @rule(client=st.sampled_from(CLIENTS), name=st.integers(0, 9).map(key))
    def reserve_strictly(self, client: int, name: bytes) -> None:
        [there] = self.ask(Exists(client, 0, (name,)))
        is_written = any(
            self.contents[number] == name and self.core.allows(writer, number, location.offset, 1, True)
            for writer in CLIENTS
            for number, location in self.reserved[writer].items()
        )
        [put] = self.ask(Reserve(client, 0, (name,), (UNIT,), mode=PutMode.STRICT, checksums=(7,)))
        if there:
            assert put.status in (PutStatus.EXISTS, PutStatus.CONFLICT)
        elif put.status is PutStatus.RESERVED:
            assert not is_written
            self.ask(Cancel(client, 0, (put.location.generation,)))
        else:
            assert put.status is (PutStatus.BUSY if is_written else PutStatus.REFUSED)

    @rule(keys=KEYS)
    def remove(self, keys: tuple[bytes, ...]) -> None:
        before = self.ask(Exists(1, 0, keys))
        assert self.ask(Remove(1, 0, keys)) == before
        assert not any(self.ask(Exists(1, 0, keys)))

    @rule(client=st.sampled_from(CLIENTS))
    def gone(self, client: int) -> None:
        self.ask(ClientGone(client))
        self.reserved[client], self.leased[client], self.elsewhere[client] = {}, [], {}

    @rule()
    def pass_deadline(self) -> None:
        deadline = self.core.deadline()
        if deadline is not None:
            self.drive.now = max(self.drive.now, deadline)
            self.ask(Tick())

    @rule()
    def snapshot(self) -> None:
        self.ask(SnapshotWanted())
        snapshot = self.drive.reports.pop()
        self.apply_reports()
        assert set(snapshot.keys) == self.directory and snapshot.seq == self.seq

    @invariant()
    def claims_never_overlap(self) -> None:
        if not hasattr(self, "core"):
            return
        claims = [(*self.reserved[c].values(), *self.leased[c], *self.elsewhere[c].values()) for c in CLIENTS]
        held = {loc.generation: loc for loc in itertools.chain(*claims)}
        ranges = sorted((loc.offset, loc.offset + loc.size) for loc in held.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        self.apply_reports()

    def write(self, location: Location) -> None:
        for unit in range(location.offset // UNIT, (location.offset + location.size - 1) // UNIT + 1):
            self.segment[unit] = location.generation

    def read(self, location: Location, name: bytes) -> None:
        first, last = location.offset // UNIT, (location.offset + location.size - 1) // UNIT
        assert set(self.segment[first : last + 1]) == {location.generation}
        assert self.contents[location.generation] == name

    def apply_reports(self) -> None:
        for report in self.drive.reports:
            assert isinstance(report, Report) and report.seq == self.seq + 1
            assert not set(report.added) & self.directory and set(report.removed) <= self.directory
            self.directory = self.directory - set(report.removed) | set(report.added)
            self.seq = report.seq
        self.drive.reports.clear()

    def teardown(self) -> None:
        if hasattr(self, "core"):
            for client in CLIENTS:
                self.ask(ClientGone(client))
            metrics = self.core.metrics()
            assert metrics["reservations"] == metrics["leases"] == 0
            assert metrics["used_bytes"] == metrics["evictable_bytes"]


TestStoreHistory = StoreHistory.TestCase
TestStoreHistory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

_numbers = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4).map(tuple)
_any_keys = st.lists(st.binary(min_size=24, max_size=24), min_size=1, max_size=4).map(tuple)


@st.composite
def _reserves(draw: st.DrawFn) -> Reserve:
    keys = draw(_any_keys)
    u64s = st.tuples(*[st.integers(0, 2**64 - 1)] * len(keys))
    flags = [draw(st.booleans()) for _ in range(3)]
    return Reserve(
        0,
        draw(st.integers(0, 2**32 - 1)),
        keys,
        draw(u64s),
        draw(st.sampled_from(PutMode)),
        *flags,
        draw(st.one_of(st.just(()), u64s)),
    )


@st.composite
def _names(draw: st.DrawFn) -> Name:
    keys = draw(_any_keys)
    u64s = st.tuples(*[st.integers(0, 2**64 - 1)] * len(keys))
    sums = st.tuples(*[st.one_of(st.none(), st.integers(0, 2**64 - 1))] * len(keys))
    checksums = draw(st.one_of(st.just(()), sums))
    return Name(0, draw(st.integers(0, 9)), keys, draw(u64s), draw(u64s), checksums)


_requests = st.one_of(
    _reserves(),
    st.builds(Commit, st.just(0), st.integers(0, 9), _numbers, st.booleans()),
    st.builds(Grant, st.just(0), st.integers(0, 9), _numbers),
    _names(),
    st.builds(Cancel, st.just(0), st.integers(0, 9), _numbers),
    st.builds(Release, st.just(0), st.integers(0, 9), _numbers),
    st.builds(Lease, st.just(0), st.integers(0, 9), _any_keys),
    st.builds(Exists, st.just(0), st.integers(0, 9), _any_keys),
    st.builds(Remove, st.just(0), st.integers(0, 9), _any_keys),
)


@given(st.lists(_requests, min_size=1, max_size=5), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_requests_survive_the_wire_in_pieces_of_any_size(requests: list[Request], step: int) -> None:
    data = b"".join(map(wire.encode_request, requests))
    reader = FrameReader(wire.MAX_CONTROL_BYTES)
    frames = [frame for at in range(0, len(data), step) for frame in reader.feed(data[at : at + step])]
    assert [wire.decode_request(0, frame) for frame in frames] == requests


@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_garbage_is_a_protocol_error_and_nothing_else(payload: bytes, kind: int, count: int) -> None:
    frame = Frame(kind, 255, count, 0, payload)
    for decode in (wire.decode_hello, wire.decode_welcome, lambda f: wire.decode_request(1, f)):
        with contextlib.suppress(ProtocolError):
            decode(frame)
