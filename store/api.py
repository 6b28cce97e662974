"""The store for programs of their own: put, get and what goes with them, in blocking calls from any thread.

    with Store.connect(["unix:/run/mooncake/n0.sock"], token=...) as store:
        store.put(key, data)                            # PutResult.STORED, EXISTS, REFUSED, BUSY or CONFLICT
        data = store.get(key)                           # bytes, or None for a miss
        size = store.get_into(key, buffer)              # without another copy
        with store.view(key) as view: ...               # the object itself, leased, without any copy; same machine

Keys are 24 bytes (`mooncake.core.keys.object_key`); `named_key` makes one of a name. Objects are immutable and at least one
byte long. Batches are in chain order, prefix first, if their objects are a chain. What a call gives is of one of three kinds: a
*miss* is None, a *refusal* a value of PutResult, and an *error* is raised, always a StoreError: BadArgument names the argument,
StoreUnavailable and DeadlineExceeded the node.

On the node's own machine reads ask nobody (`mooncake.store.local`), and bytes are copied once, by the caller's thread. From
elsewhere they go through sockets, straight from and into the segment, and are checked against the checksum that the writer
took.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import msgspec

from mooncake.core.errors import BadArgument, Damaged, StoreUnavailable
from mooncake.core.keys import OBJECT_KEY_BYTES
from mooncake.store import contents
from mooncake.store.events import Cancel, Commit, Exists, Lease, Release, Remove, Reserve
from mooncake.store.handles import Hold, LeasedObjects, Link, Reservation
from mooncake.store.operations import DEADLINE_S
from mooncake.store.session import NodeSession
from mooncake.store.types import CommitStatus, Places, PutMode, Puts, PutStatus
from mooncake.transport.base import Piece


class PutResult(enum.IntEnum):
    STORED = 0
    EXISTS = 1
    """It was there before, or another writer was first. In strict mode: with the same contents."""
    REFUSED = 2
    """There is no room now: what is not leased, pinned or being written is gone already."""
    BUSY = 3
    """Strict mode: somebody else is writing this key."""
    CONFLICT = 4
    """Strict mode: it exists with other contents, or such that cannot be compared."""
    LOST = 5
    """The node gave the reservation up before all was written."""


_OF_PUT = {
    PutStatus.EXISTS: PutResult.EXISTS,
    PutStatus.REFUSED: PutResult.REFUSED,
    PutStatus.BUSY: PutResult.BUSY,
    PutStatus.CONFLICT: PutResult.CONFLICT,
}
_OF_COMMIT = {
    CommitStatus.COMMITTED: PutResult.STORED,
    CommitStatus.EXISTS: PutResult.EXISTS,
    CommitStatus.EXPIRED: PutResult.LOST,
    CommitStatus.UNKNOWN: PutResult.LOST,
}


class Stat(msgspec.Struct, frozen=True):
    """checksum: xxh3-64, if the writer took one."""

    size: int
    checksum: int | None


def named_key(name: str | bytes) -> bytes:
    """The key of an object that is called by a name."""
    data = name.encode() if isinstance(name, str) else name
    return hashlib.blake2b(data, digest_size=OBJECT_KEY_BYTES, person=b"mooncake.name").digest()


class Store:
    """deadline_s: of every call, unless it is given another."""

    def __init__(self, session: NodeSession, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self._session = session
        self._pins: dict[bytes, LeasedObjects] = {}
        self._lock = threading.Lock()

    @classmethod
    def connect(
        cls,
        addresses: Sequence[str],
        *,
        token: str,
        name: str = "store-client",
        tenant: str = "",
        deadline_s: float = DEADLINE_S,
    ) -> Store:
        """To the node behind these addresses. Raises AuthError, StoreUnavailable or DeadlineExceeded."""
        session = NodeSession(addresses, token=token, name=name, tenant=tenant)
        session.link(deadline_s)
        return cls(session, deadline_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leases, pins and what is not committed go with it."""
        self._session.close()

    # ------------------------------------------------------------ put

    def put(self, key: bytes, data: Any, *, strict: bool = False) -> PutResult:
        """data: a C-contiguous buffer, which is not needed afterwards."""
        return self.put_batch((key,), (data,), strict=strict)[0]

    def put_batch(self, keys: Sequence[bytes], data: Sequence[Any], *, strict: bool = False) -> list[PutResult]:
        """By key, what became of it. strict: contents are compared with what exists."""
        if len(data) != len(keys):
            raise BadArgument(f"data: {len(data)} buffers for {len(keys)} keys")
        buffers = [contents.as_bytes(each, f"data[{at}]") for at, each in enumerate(data)]
        checksums = tuple([contents.checksum(each) for each in buffers]) if strict else ()
        mode = PutMode.STRICT if strict else PutMode.EQUIVALENT
        reservation = self._reserve(keys, [each.nbytes for each in buffers], mode, checksums)
        new = reservation.held(Hold.WRITING)
        results = [_OF_PUT.get(status, PutResult.LOST) for status in reservation.statuses]
        if not new:
            return results
        try:
            places = [reservation.locations[at] for at in new]
            pieces = [
                Piece(place.offset, buffers[at], place.generation)
                for at, place in zip(new, places, strict=True)
                if place is not None
            ]
            written = contents.write(reservation.link, pieces)
            statuses = self._commit(reservation, new, written)
        except BaseException:
            self._cancel(reservation, new)
            raise
        for at, status in zip(new, statuses, strict=True):
            results[at] = _OF_COMMIT[status]
        return results

    @contextlib.contextmanager
    def writing(self, key: bytes, size: int) -> Iterator[WriteSession | PutResult]:
        """An object that is written range by range, in any order, and committed when all is there: see `WriteSession`. Gives a
        PutResult instead if there is nothing to write. What is not committed at the end is given up."""
        reservation = self._reserve((key,), (size,), PutMode.EQUIVALENT, ())
        [status] = reservation.statuses
        if status is not PutStatus.RESERVED:
            yield _OF_PUT[status]
            return
        try:
            yield WriteSession(reservation, size, lambda: _OF_COMMIT[self._commit(reservation, [0], ())[0]])
        finally:
            if reservation.held(Hold.WRITING):
                self._cancel(reservation, [0])

    # ------------------------------------------------------------ get

    def get(self, key: bytes) -> bytes | None:
        return self.get_batch((key,))[0]

    def get_batch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """None for those that are missed."""
        with self.leased(keys) as objects:
            sizes = [None if place is None else place.size for place in objects.locations]
            buffers = [bytearray(size or 0) for size in sizes]
            self._read(keys, objects, sizes, [memoryview(each) for each in buffers])
        return [None if size is None else bytes(each) for size, each in zip(sizes, buffers, strict=True)]

    def get_into(self, key: bytes, buffer: Any) -> int | None:
        """The object's size, or None for a miss. buffer: writable and at least as long."""
        return self.get_into_batch((key,), (buffer,))[0]

    def get_into_batch(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> list[int | None]:
        """By key, the object's size, or None for a miss, whose buffer is as it was or holds bytes of no meaning."""
        if len(buffers) != len(keys):
            raise BadArgument(f"buffers: {len(buffers)} for {len(keys)} keys")
        views = [contents.as_bytes(each, f"buffers[{at}]", writable=True) for at, each in enumerate(buffers)]
        local = self._link().local
        copied = local.copy_out(keys, views) if local is not None else None
        if copied is not None:
            return list(copied)
        with self.leased(keys) as objects:
            sizes = [None if place is None else place.size for place in objects.locations]
            for at, size in enumerate(sizes):
                if size is not None and views[at].nbytes < size:
                    raise BadArgument(f"buffers[{at}]: {views[at].nbytes} bytes for an object of {size}")
            self._read(keys, objects, sizes, [view[:size] for view, size in zip(views, sizes, strict=True)])
        return sizes

    @contextlib.contextmanager
    def view(self, key: bytes) -> Iterator[memoryview | None]:
        """The object itself, read-only, or None for a miss; it stays as it is until the end. Raises BadArgument where the
        node's memory is not mapped, as on another machine."""
        with self.leased((key,)) as objects:
            yield objects.view(0) if objects.hits else None

    @contextlib.contextmanager
    def leased(self, keys: Sequence[bytes]) -> Iterator[LeasedObjects]:
        """Objects that stay where they are until the end, to be read in ranges (`LeasedObjects.read`)."""
        objects = self._lease(keys)
        try:
            yield objects
        finally:
            self._release(objects)

    # ------------------------------------------------------------ about objects

    def exists(self, key: bytes) -> bool:
        """Whether it can be read. Does not count as a use."""
        local = self._link().local
        if local is not None and local.index.contains(key):
            return True
        return self.exists_batch((key,))[0]

    def exists_batch(self, keys: Sequence[bytes]) -> list[bool]:
        return list(self._session.call(Exists(0, 0, tuple(keys)), self.deadline_s))

    def stat(self, key: bytes) -> Stat | None:
        return self.stat_batch((key,))[0]

    def stat_batch(self, keys: Sequence[bytes]) -> list[Stat | None]:
        """None for those that are missed."""
        with self.leased(keys) as objects:
            pairs = zip(objects.locations, objects.checksums, strict=True)
            return [None if place is None else Stat(place.size, checksum) for place, checksum in pairs]

    def remove(self, key: bytes) -> bool:
        return self.remove_batch((key,))[0]

    def remove_batch(self, keys: Sequence[bytes]) -> list[bool]:
        """By key, whether there was such an object. Who leased it before keeps it until it is released."""
        return list(self._session.call(Remove(0, 0, tuple(keys)), self.deadline_s))

    def pin(self, key: bytes) -> bool:
        """Whether it was there; then it is not evicted until `unpin`, or until this client closes."""
        with self._lock:
            if key in self._pins:
                return True
            objects = self._lease((key,))
            if objects.hits:
                self._pins[key] = objects
            return objects.hits > 0

    def unpin(self, key: bytes) -> bool:
        """Whether it was pinned by this client."""
        with self._lock:
            objects = self._pins.pop(key, None)
        if objects is not None:
            self._release(objects)
        return objects is not None

    # ------------------------------------------------------------ calls

    def _link(self) -> Link:
        return self._session.link(self.deadline_s)

    def _reserve(
        self, keys: Sequence[bytes], sizes: Sequence[int], mode: PutMode, checksums: tuple[int, ...]
    ) -> Reservation:
        link = self._link()
        request = Reserve(0, 0, tuple(keys), tuple(sizes), mode, checksums=checksums)
        puts: Puts = self._session.call(request, self.deadline_s, link=link)
        return Reservation(link, puts.locations(), puts.statuses)

    def _commit(
        self, reservation: Reservation, indices: Sequence[int], checksums: tuple[int, ...]
    ) -> tuple[CommitStatus, ...]:
        reservation.mark(indices, Hold.CLOSED)
        request = Commit(0, 0, reservation.numbers(indices), False, checksums)
        statuses: tuple[CommitStatus, ...] = self._session.call(request, self.deadline_s, link=reservation.link)
        return statuses

    def _cancel(self, reservation: Reservation, indices: Sequence[int]) -> None:
        """If the node cannot be told, it sees the connection end."""
        reservation.mark(indices, Hold.CLOSED)
        with contextlib.suppress(StoreUnavailable):
            self._session.call(Cancel(0, 0, reservation.numbers(indices)), self.deadline_s, link=reservation.link)

    def _lease(self, keys: Sequence[bytes]) -> LeasedObjects:
        link = self._link()
        leased = link.local.lease(keys) if link.local is not None else None
        if leased is not None:
            return LeasedObjects.found(link, *leased)
        places: Places = self._session.call(Lease(0, 0, tuple(keys)), self.deadline_s, link=link)
        return LeasedObjects.placed(link, places)

    def _release(self, objects: LeasedObjects) -> None:
        held = objects.held(Hold.LEASED)
        objects.mark(held, Hold.CLOSED)
        if objects.slots is not None and objects.link.local is not None:
            objects.link.local.release([objects.slots[at] for at in held])
        elif held and objects.link.lost is None:
            with contextlib.suppress(StoreUnavailable):
                self._session.call(Release(0, 0, objects.numbers(held)), self.deadline_s, link=objects.link)

    def _read(
        self, keys: Sequence[bytes], objects: LeasedObjects, sizes: list[int | None], buffers: Sequence[memoryview]
    ) -> None:
        """Fill the buffers. A damaged object is a miss, whose size is None then, and gone."""
        try:
            objects.read_batch([(at, 0, buffers[at]) for at, size in enumerate(sizes) if size is not None])
        except Damaged as error:
            for at in error.indices:
                sizes[at] = None
            damaged = tuple([keys[at] for at in error.indices])
            self._session.call(Remove(0, 0, damaged, damaged=True), self.deadline_s)


class WriteSession:
    """An object that is being written. Ranges may come in any order, but each only once and all before `commit`."""

    def __init__(self, reservation: Reservation, size: int, commit: Callable[[], PutResult]) -> None:
        self.size = size
        self._reservation = reservation
        self._commit = commit

    def write(self, offset: int, data: Any) -> None:
        """Blocks until it is there. Raises BadArgument for a range outside of the object."""
        self._reservation.write(0, offset, contents.as_bytes(data, "data"))

    def fill(self, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        """Call `fill` with a buffer whose bytes become that range; on the same machine the object itself."""
        self._reservation.fill(0, offset, size, fill)

    def commit(self) -> PutResult:
        """What was never written is undefined."""
        return self._commit()
