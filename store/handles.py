"""What a client holds: reservations to write, leases to read. Data calls block and may come from any thread.

Each key of a batch has an index and a hold of its own, because a long prompt is reserved at once and committed chunk by
chunk:

    RESERVED: WRITING ──commit──▶ CLOSED, or LEASED if the commit asked for it        EXISTS and leased: LEASED
              WRITING ──cancel──▶ CLOSED          LEASED ──release──▶ CLOSED          anything else:     NOTHING

Before an index is committed, cancelled or released, no data call may be running on it: its space may be somebody else's
right after. So closing an index stops new data calls at once, and the client waits for those under way (`busy`).
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mooncake.core.errors import (
    BadArgument,
    Damaged,
    DeadlineExceeded,
    HandleLost,
    OutOfRange,
    StoreError,
    StoreUnavailable,
    TransferTimeout,
    TransportError,
)
from mooncake.store import contents
from mooncake.store.contents import RunningChecksum
from mooncake.store.local.index import Found
from mooncake.store.local.reader import LocalReader
from mooncake.store.types import Location, Places, PutStatus
from mooncake.transport.base import Path, Piece

DataPiece = tuple[int, int, Any]
"""index in the batch, offset in the object, buffer (C-contiguous; anything that memoryview takes)"""


class Hold(enum.IntEnum):
    NOTHING = 0
    WRITING = 1
    LEASED = 2
    CLOSED = 3
    ELSEWHERE = 4
    """Committed, but another writer's copy was first: that one is leased, and read by its key, not through this handle."""


class Link:
    """One connection to a node, as its handles see it. `lost`: why it ended. local: reads of this machine's node that go
    without it. charges_tenants: whether the node wants to know for whom a request is."""

    def __init__(self, path: Path, local: LocalReader | None = None, *, charges_tenants: bool = False) -> None:
        self.path = path
        self.local = local
        self.charges_tenants = charges_tenants
        self.lost: str | None = None
        self.num_calls = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def call(self, *, outlives: bool = False) -> Iterator[Path]:
        """A data call. The connection must not be closed under it: the node takes that as the client's death. outlives: the
        claim does not go with the connection."""
        with self._lock:
            if self.lost is not None and not outlives:
                raise HandleLost(f"the claim went with its connection: {self.lost}")
            self.num_calls += 1
        try:
            yield self.path
        except TransportError as error:
            raise _as_store_error(error) from error
        finally:
            with self._lock:
                self.num_calls -= 1

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A data call that writes."""
        with self.call() as path:
            if self.local is None:
                yield path
                return
            if not self.local.begin_write():
                raise HandleLost("the claim went with its node: the segment has another owner now")
            try:
                yield path
            finally:
                self.local.end_write()

    def close(self, *, release: bool) -> None:
        """No data call is running. Leases that outlive the connection last until they are released, unless all are released
        with it."""
        if self.local is not None and release:
            self.local.close()
        elif self.local is not None:
            self.local.retire()
        self.path.close()

    def idle(self) -> bool:
        """Whether no data call is running."""
        return self.num_calls == 0

    def lose(self, why: str) -> None:
        with self._lock:
            self.lost = self.lost or why


def _as_store_error(error: TransportError) -> StoreError:
    if isinstance(error, OutOfRange):
        return BadArgument(str(error))
    if isinstance(error, TransferTimeout):
        return DeadlineExceeded(str(error))
    return StoreUnavailable(str(error))


class LeasedObjects:
    """Leases of one batch; index i belongs to key i. Hold `locations[i] is None`: a miss, nothing to release.

    slots: by index, of leases that the client took by itself (`mooncake.store.local`); they do not go with the connection."""

    def __init__(
        self,
        link: Link,
        locations: Sequence[Location | None],
        holds: Sequence[Hold],
        checksums: tuple[int | None, ...] = (),
        slots: Sequence[int] | None = None,
    ) -> None:
        self.link = link
        self.slots = slots
        self.locations = tuple(locations)
        self.checksums: tuple[int | None, ...] = checksums or (None,) * len(self.locations)
        self._holds = list(holds)
        self._num_running = [0] * len(self._holds)
        self._running: dict[int, RunningChecksum] = {}
        """Of objects that are read, or written, range by range."""
        self.damaged: dict[int, None] = {}
        """Those that were found to be; whoever leased them should have them removed."""
        self.num_loaded = 0
        """How many were read from SSD for the lease."""
        self._lock = threading.Lock()

    @classmethod
    def placed(cls, link: Link, places: Places) -> LeasedObjects:
        """What a Lease was answered with."""
        locations = places.locations()
        leased = cls(link, locations, [Hold.LEASED if each else Hold.NOTHING for each in locations], places.checksums)
        leased.num_loaded = places.num_loaded
        return leased

    @classmethod
    def found(cls, link: Link, found: Sequence[Found], slots: Sequence[int]) -> LeasedObjects:
        """What the client leased by itself."""
        locations = [Location(each.offset, each.size, each.number) for each in found]
        return cls(link, locations, [Hold.LEASED] * len(found), tuple([each.checksum for each in found]), slots)

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def hits(self) -> int:
        """How many leading objects are leased: the prefix that can be read."""
        return next((at for at, hold in enumerate(self._holds) if hold is not Hold.LEASED), len(self._holds))

    def read(self, index: int, offset: int, out: Any) -> None:
        """Fill `out` (a writable buffer of bytes) from object `index`, from `offset` bytes on. Blocks until it is
        there."""
        self.read_batch(((index, offset, out),))

    def read_batch(self, pieces: Sequence[DataPiece]) -> None:
        """All of them in one call; over TCP in one round trip. Raises Damaged if objects that were read whole, or range by
        range in order, do not have the checksum that their writers took."""
        damaged: list[int] = []
        following = iter(pieces)

        def check(piece: Piece) -> None:
            index, offset, _ = next(following)
            if not self._is_sound(index, offset, piece.local):
                damaged.append(index)

        with self._using(pieces, Hold.LEASED) as batch, self._reading() as path:
            path.read(batch, check).wait()
        if damaged:
            self.damaged.update(dict.fromkeys(damaged))
            raise Damaged(f"objects {damaged} of {len(self)} do not match their checksums", damaged)

    def view(self, index: int) -> memoryview:
        """The object itself, read-only and without a copy, valid until it is released. Raises BadArgument where the
        segment is not mapped (`mapped`)."""
        with self._using((), Hold.LEASED), self._reading() as path:
            location = self._location(index, Hold.LEASED)
            view = path.view(location.offset, location.size)
        if view is None:
            raise BadArgument("view: the node's segment is not mapped here; read it")
        return view.toreadonly()

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        """Call `use` with [offset, offset + size) of object `index`: the segment itself where it is mapped, else a copy. The
        bytes stay valid during the call only."""
        with self._open(index, offset, size, Hold.LEASED) as start, self._reading() as path:
            view = path.view(start, size)
            if view is not None:
                use(view)
                return
        staging = memoryview(bytearray(size))
        self.read(index, offset, staging)
        use(staging)

    @property
    def mapped(self) -> bool:
        """Whether `view` works: same machine, shared memory."""
        return self.link.path.view(0, 1) is not None

    def held(self, hold: Hold, indices: Iterable[int] | None = None) -> list[int]:
        """Indices, among those given or all, that are held so."""
        among = range(len(self._holds)) if indices is None else indices
        return [at for at in among if self._holds[at] is hold]

    def numbers(self, indices: Iterable[int]) -> tuple[int, ...]:
        located = (self.locations[at] for at in indices)
        return tuple(location.generation for location in located if location is not None)

    def mark(self, indices: Iterable[int], hold: Hold) -> None:
        with self._lock:
            for at in indices:
                self._holds[at] = hold

    def busy(self, indices: Iterable[int]) -> bool:
        """Whether data calls are running on any of these."""
        with self._lock:
            return any(self._num_running[at] for at in indices)

    @contextlib.contextmanager
    def _using(self, pieces: Sequence[DataPiece], hold: Hold) -> Iterator[list[Piece]]:
        """The pieces as ranges of the segment, checked, and their indices kept open meanwhile."""
        with self._lock:
            batch = [self._piece(index, offset, data, hold) for index, offset, data in pieces]
            for index, _, _ in pieces:
                self._num_running[index] += 1
        try:
            yield batch
        finally:
            with self._lock:
                for index, _, _ in pieces:
                    self._num_running[index] -= 1

    def _is_sound(self, index: int, offset: int, view: memoryview) -> bool:
        """Unless it is known that it is not."""
        checksum, place = self.checksums[index], self.locations[index]
        if checksum is None or place is None:
            return True
        if view.nbytes == place.size:
            return contents.checksum(view) == checksum
        running = self._running.setdefault(index, RunningChecksum())
        running.add(offset, view)
        return running.digest(place.size) in (None, checksum)

    def _reading(self) -> contextlib.AbstractContextManager[Path]:
        return self.link.call(outlives=self.slots is not None)

    @contextlib.contextmanager
    def _open(self, index: int, offset: int, size: int, hold: Hold) -> Iterator[int]:
        """Where that range of the object is in the segment; it is kept claimed meanwhile."""
        with self._lock:
            start = self._location(index, hold).offset + self._in_bounds(index, offset, size)
            self._num_running[index] += 1
        try:
            yield start
        finally:
            with self._lock:
                self._num_running[index] -= 1

    def _piece(self, index: int, offset: int, data: Any, hold: Hold) -> Piece:
        location = self._location(index, hold)
        try:
            local = memoryview(data)
            local = local if local.format == "B" and local.ndim == 1 else local.cast("B")
        except TypeError as error:
            raise BadArgument(f"data: must be a C-contiguous buffer: {error}") from error
        if hold is Hold.LEASED and local.readonly:
            raise BadArgument("out: the buffer is read-only")
        return Piece(location.offset + self._in_bounds(index, offset, local.nbytes), local, location.generation)

    def _in_bounds(self, index: int, offset: int, size: int) -> int:
        location = self.locations[index]
        if location is None or not size or offset < 0 or offset + size > location.size:
            raise BadArgument(
                f"offset: [{offset}, {offset + size}) of an object of {location.size if location else 0} bytes"
            )
        return offset

    def _location(self, index: int, hold: Hold) -> Location:
        if not 0 <= index < len(self._holds):
            raise BadArgument(f"index: {index} of a batch of {len(self._holds)}")
        location = self.locations[index]
        if self._holds[index] is not hold or location is None:
            raise BadArgument(f"index: object {index} is {self._holds[index].name}, must be {hold.name}")
        return location


class Reservation(LeasedObjects):
    """Answer to a reserve call. Those RESERVED can be written, those that EXIST and were leased can be read."""

    def __init__(self, link: Link, locations: Sequence[Location | None], statuses: Sequence[PutStatus]) -> None:
        holds = [
            Hold.WRITING if status is PutStatus.RESERVED else Hold.NOTHING if location is None else Hold.LEASED
            for status, location in zip(statuses, locations, strict=True)
        ]
        super().__init__(link, locations, holds)
        self.statuses = tuple(statuses)

    def write(self, index: int, offset: int, data: Any) -> None:
        """Copy `data` (a buffer of bytes) into object `index`, from `offset` bytes on. Blocks until it is there. Ranges
        may come in any order; what is never written is undefined."""
        self.write_batch(((index, offset, data),))

    def write_batch(self, pieces: Sequence[DataPiece]) -> None:
        """All of them in one call; over TCP in one round trip."""
        with self._using(pieces, Hold.WRITING) as batch, self.link.writing() as path:
            path.write(batch).wait()
            for (index, offset, _), (_, local, _) in zip(pieces, batch, strict=True):
                self._note(index, offset, local)

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        """Call `fill` with a buffer for [offset, offset + size) of object `index`: the segment itself where it is mapped, else
        one that is written afterwards."""
        with self._open(index, offset, size, Hold.WRITING) as start, self.link.writing() as path:
            view = path.view(start, size)
            if view is not None:
                fill(view)
                self._note(index, offset, view)
                return
        staging = memoryview(bytearray(size))
        fill(staging)
        self.write(index, offset, staging)

    def written_checksums(self, indices: Sequence[int]) -> tuple[int | None, ...]:
        """Of these, None for what was not written in order; empty if all are unknown."""
        found = []
        for at in indices:
            running, place = self._running.get(at), self.locations[at]
            found.append(None if running is None or place is None else running.digest(place.size))
        return tuple(found) if any(each is not None for each in found) else ()

    def _note(self, index: int, offset: int, data: memoryview) -> None:
        self._running.setdefault(index, RunningChecksum()).add(offset, data)
