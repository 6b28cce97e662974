"""The store for programs of their own: put, get and what goes with them, in blocking calls from any thread.

    with Store.connect(["unix:/run/mooncake/n0.sock"], token=...) as store:        # one node
    with Store.connect(directory=["tcp://10.0.0.1:7200"], cluster=..., token=...) as store:    # all nodes of a cluster
        store.put(key, data)                            # PutResult.STORED, EXISTS, REFUSED, BUSY, CONFLICT or LOST
        data = store.get(key)                           # bytes, or Absent.MISS or UNKNOWN, which are false
        size = store.get_into(key, buffer)              # without another copy
        with store.view(key) as view: ...               # the object itself, leased, without any copy; same machine

Keys are 24 bytes (`mooncake.core.keys.object_key`); `named_key` makes one of a name. Objects are immutable and at least one
byte long. Batches are in chain order, prefix first, if their objects are a chain.

What a call gives is of one of four kinds: a *miss* and *unknown* are values of Absent, a *refusal* is one of PutResult, and an
*error* is raised, always a StoreError: BadArgument names the argument, StoreUnavailable and DeadlineExceeded the node.

Objects are put to the *home* node, that of this machine if there is one. Reads look there first, and then, with a directory,
where it says that replicas are, the next one as soon as one fails. On the home node's own machine they ask nobody
(`mooncake.store.local`), and bytes are copied once, by the caller's thread. From elsewhere they go through sockets, straight
from and into the segment. Both ways they are checked against the checksum that the writer took; a view is not.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import msgspec

from mooncake.core.errors import BadArgument, DeadlineExceeded, HandleLost, StoreUnavailable
from mooncake.core.keys import OBJECT_KEY_BYTES
from mooncake.core.messages import NodeInfo
from mooncake.core.types import Tier
from mooncake.store import contents, reading
from mooncake.store.directory.core import REPLICAS_MAX, Found
from mooncake.store.directory.session import DirectorySession
from mooncake.store.events import Cancel, Commit, Exists, Grant, Name, Remove, Reserve
from mooncake.store.grants import Grants, Slot, granted_max, slots_of
from mooncake.store.handles import Hold, LeasedObjects, Link, Reservation
from mooncake.store.local.reader import LocalReader
from mooncake.store.operations import DEADLINE_S
from mooncake.store.peers import Peers
from mooncake.store.reading import LAST_ATTEMPT_S, Absent
from mooncake.store.session import NodeSession
from mooncake.store.types import CommitStatus, PutMode, Puts, PutStatus
from mooncake.transport.base import MappedPath, Piece

__all__ = ["Absent", "LeasedView", "PutResult", "Replica", "Stat", "Store", "WriteBatch", "WriteSession", "named_key"]

_POLL_S = 0.01


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


_RESERVED = PutStatus.RESERVED
_OF_PUT = {
    PutStatus.RESERVED: PutResult.LOST,  # as long as it is not committed
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
_THERE = (PutResult.STORED, PutResult.EXISTS)


class Stat(msgspec.Struct, frozen=True):
    """node: who was asked. checksum: xxh3-64, if the writer took one."""

    size: int
    checksum: int | None
    node: str


class Replica(msgspec.Struct, frozen=True):
    node: str
    tier: Tier


def named_key(name: str | bytes) -> bytes:
    """The key of an object that is called by a name."""
    data = name.encode() if isinstance(name, str) else name
    return hashlib.blake2b(data, digest_size=OBJECT_KEY_BYTES, person=b"mooncake.name").digest()


class Store:
    """deadline_s: of every call."""

    def __init__(
        self, home: NodeSession, directory: DirectorySession | None, peers: Peers, deadline_s: float = DEADLINE_S
    ) -> None:
        self.deadline_s = deadline_s
        self._home = home
        self._directory = directory
        self._peers = peers
        self._grants = Grants()
        self._pins: dict[bytes, LeasedObjects] = {}
        self._lock = threading.Lock()

    @classmethod
    def connect(
        cls,
        addresses: Sequence[str] = (),
        *,
        token: str,
        directory: Sequence[str] = (),
        cluster: str = "",
        name: str = "store-client",
        tenant: str = "",
        deadline_s: float = DEADLINE_S,
    ) -> Self:
        """addresses: of the home node; by default the directory's node on this machine, or any. Raises AuthError,
        StoreUnavailable, DeadlineExceeded, or BadArgument if there is neither."""

        def session(addresses: Sequence[str], node: str = "") -> NodeSession:
            stall_s = min(deadline_s, LAST_ATTEMPT_S) if directory else deadline_s
            return NodeSession(addresses, token=token, name=name, tenant=tenant, node=node, stall_s=stall_s)

        found = DirectorySession(directory, cluster=cluster, token=token, name=name) if directory else None
        if not addresses:
            if found is None:
                raise BadArgument("addresses: neither a node nor a directory is given")
            info = _choose_home(found.nodes(deadline_s), name)
            home = session(info.addresses, info.name)
        else:
            home = session(addresses)
        home.link(deadline_s)
        return cls(home, found, Peers(lambda info: session(info.addresses, info.name)), deadline_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leases, pins and what is not committed go with it."""
        self._home.close()
        self._peers.close()
        if self._directory is not None:
            self._directory.close()

    # ------------------------------------------------------------ put

    def put(self, key: bytes, data: Any, *, strict: bool = False, replicas: int = 1) -> PutResult:
        """data: a C-contiguous buffer, which is not needed afterwards."""
        return self.put_batch((key,), (data,), strict=strict, replicas=replicas)[0]

    def put_batch(
        self, keys: Sequence[bytes], data: Sequence[Any], *, strict: bool = False, replicas: int = 1
    ) -> list[PutResult]:
        """By key, what became of it. strict: contents are compared with what exists. replicas: on how many nodes they are to
        be; further ones are made behind the call (`replicate` waits for them). With a directory, it knows them afterwards."""
        if len(data) != len(keys):
            raise BadArgument(f"data: {len(data)} buffers for {len(keys)} keys")
        self._check_replicas(replicas)
        buffers = [contents.as_bytes(each, f"data[{at}]") for at, each in enumerate(data)]
        results = None
        if not strict:
            with contextlib.suppress(HandleLost):  # the grants went with a connection; there may be a new one
                results = self._put_granted(keys, buffers)
        if results is None:
            results = self._put_reserved(keys, buffers, strict=strict)
        if self._directory is not None and PutResult.STORED in results:
            self._home.sync(self.deadline_s)
        there = [key for key, result in zip(keys, results, strict=True) if result in _THERE]
        if replicas > 1 and there and self._directory is not None:
            self._directory.want(there, replicas, self.deadline_s)
        return results

    @contextlib.contextmanager
    def writing(self, key: bytes, size: int) -> Iterator[WriteSession | PutResult]:
        """An object that is written range by range, in any order, and committed when all is there: see `WriteSession`. Gives a
        PutResult instead if there is nothing to write. What is not committed at the end is given up."""
        puts, link = self._reserve((key,), (size,), PutMode.EQUIVALENT, ())
        reservation = Reservation(link, puts.locations(), puts.statuses)
        [status] = puts.statuses
        if status is not _RESERVED:
            yield _OF_PUT[status]
            return
        try:
            yield WriteSession(reservation, size, lambda: self._commit_session(reservation))
        finally:
            if reservation.held(Hold.WRITING):
                reservation.mark([0], Hold.CLOSED)
                self._cancel(link, reservation.numbers([0]))

    def write_batch(self, keys: Sequence[bytes], sizes: Sequence[int]) -> WriteBatch:
        """Objects that are written range by range, from any threads, and committed one after the other: see `WriteBatch`.
        Whoever asks for it closes it."""
        puts, link = self._reserve(keys, sizes, PutMode.EQUIVALENT, ())
        return WriteBatch(Reservation(link, puts.locations(), puts.statuses), self._commit_written, self._cancel)

    # ------------------------------------------------------------ get

    def get(self, key: bytes) -> bytes | Absent:
        return self.get_batch((key,))[0]

    def get_batch(self, keys: Sequence[bytes]) -> list[bytes | Absent]:
        buffers = [bytearray()] * len(keys)

        def make(at: int, size: int) -> memoryview:
            buffers[at] = bytearray(size)
            return memoryview(buffers[at])

        sizes = self._read(keys, make)
        return [
            size if isinstance(size, Absent) else bytes(buffer) for size, buffer in zip(sizes, buffers, strict=True)
        ]

    def get_into(self, key: bytes, buffer: Any) -> int | Absent:
        """The object's size. buffer: writable and at least as long."""
        return self.get_into_batch((key,), (buffer,))[0]

    def get_into_batch(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> list[int | Absent]:
        """By key, the object's size. Where there is none, the buffer is as it was or holds bytes of no meaning."""
        if len(buffers) != len(keys):
            raise BadArgument(f"buffers: {len(buffers)} for {len(keys)} keys")
        views = [contents.as_bytes(each, f"buffers[{at}]", writable=True) for at, each in enumerate(buffers)]

        def choose(at: int, size: int) -> memoryview:
            if views[at].nbytes < size:
                raise BadArgument(f"buffers[{at}]: {views[at].nbytes} bytes for an object of {size}")
            return views[at][:size]

        return self._read(keys, choose)

    def view(self, key: bytes) -> LeasedView:
        """A context that gives the home node's object itself, read-only, or Absent.MISS; it stays as it is until the end.
        Raises BadArgument where the node's memory is not mapped, as on another machine."""
        return LeasedView(self._home, key, self.deadline_s)

    @contextlib.contextmanager
    def leased(self, keys: Sequence[bytes]) -> Iterator[LeasedObjects]:
        """Objects of the home node that stay where they are until the end, to be read in ranges (`LeasedObjects.read`)."""
        with reading.leased(self._home, keys, self.deadline_s) as objects:
            yield objects

    # ------------------------------------------------------------ about objects

    def exists(self, key: bytes) -> bool:
        """Whether it can be read. Does not count as a use."""
        local = self._local()
        if local is not None and local.index.contains(key):
            return True
        return self.exists_batch((key,))[0]

    def exists_batch(self, keys: Sequence[bytes]) -> list[bool]:
        found = list(self._home.call(Exists(0, 0, tuple(keys)), self.deadline_s))
        rest = [at for at, is_there in enumerate(found) if not is_there]
        if rest and self._directory is not None:
            answer = self._directory.find([keys[at] for at in rest], self.deadline_s)
            home = self._home.node_name(self.deadline_s)
            for at, replicas in zip(rest, _replicas(answer), strict=True):
                found[at] = any(replica.node != home for replica in replicas)
        return found

    def stat(self, key: bytes) -> Stat | None:
        return self.stat_batch((key,))[0]

    def stat_batch(self, keys: Sequence[bytes]) -> list[Stat | None]:
        """Of the home node's objects; None for those that it does not have."""
        name = self._home.node_name(self.deadline_s)
        with self.leased(keys) as objects:
            pairs = zip(objects.locations, objects.checksums, strict=True)
            return [None if place is None else Stat(place.size, checksum, name) for place, checksum in pairs]

    def locate(self, keys: Sequence[bytes]) -> list[list[Replica]]:
        """Where the directory knows replicas of each. Raises BadArgument without one."""
        return _replicas(self._directory_or_raise().find(keys, self.deadline_s))

    def replicate(self, keys: Sequence[bytes], replicas: int, deadline_s: float | None = None) -> list[int]:
        """Have each on so many nodes, now and when one of them is lost; waits until they are there or the time is over. On how
        many each is. Raises BadArgument without a directory."""
        self._check_replicas(replicas)
        directory, until = self._directory_or_raise(), time.monotonic() + (deadline_s or self.deadline_s)
        found = directory.want(keys, replicas, self.deadline_s)
        while True:
            counts = [len({replica.node for replica in each}) for each in _replicas(found)]
            if min(counts) >= replicas or time.monotonic() > until:
                return counts
            time.sleep(_POLL_S)
            found = directory.find(keys, self.deadline_s)

    def remove(self, key: bytes) -> bool:
        return self.remove_batch((key,))[0]

    def remove_batch(self, keys: Sequence[bytes]) -> list[bool]:
        """By key, whether there was such an object anywhere. Who leased it before keeps it until it is released."""
        request = Remove(0, 0, tuple(keys))
        removed = list(self._home.call(request, self.deadline_s))
        if self._directory is not None:
            found = self._directory.want(keys, 1, self.deadline_s)
            home = self._home.node_name(self.deadline_s)
            for info in found.nodes.values():
                if info.name != home:
                    elsewhere = self._peers.session(info).call(request, self.deadline_s)
                    removed = [one or other for one, other in zip(removed, elsewhere, strict=True)]
        return removed

    def pin(self, key: bytes) -> bool:
        """Whether it was at the home node; then it is not evicted there until `unpin`, or until this client closes."""
        with self._lock:
            if key in self._pins:
                return True
            objects = reading.lease(self._home, (key,), self.deadline_s)
            if objects.hits:
                self._pins[key] = objects
            return objects.hits > 0

    def unpin(self, key: bytes) -> bool:
        """Whether it was pinned by this client."""
        with self._lock:
            objects = self._pins.pop(key, None)
        if objects is not None:
            reading.release(self._home, objects, self.deadline_s)
        return objects is not None

    # ------------------------------------------------------------ writing

    def _put_granted(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[PutResult] | None:
        """Into space that was granted before, so that the node is asked once; None if that cannot be: then nothing is done."""
        link, welcome, local = self._home.link(self.deadline_s), self._home.welcome(self.deadline_s), self._local()
        results = [PutResult.EXISTS] * len(keys)
        new = [at for at, key in enumerate(keys) if local is None or not local.index.contains(key)]
        if not new:
            return results if keys else None
        sizes = tuple([buffers[at].nbytes for at in new])
        extents = tuple([(size + welcome.alignment - 1) & -welcome.alignment for size in sizes])
        most = granted_max(welcome.capacity)
        if 2 * sum(extents) > most or len(set(keys)) < len(keys):
            return None
        slots = self._take_grants(link, extents)
        if slots is None:
            return None
        pieces = [Piece(slot.offset, buffers[at], slot.number) for at, slot in zip(new, slots, strict=True)]
        names, numbers = tuple([keys[at] for at in new]), tuple([slot.number for slot in slots])
        try:
            checksums = _write(link, pieces, lambda: self._ask_ahead(link, extents, most))
            statuses = self._home.call(Name(0, 0, names, numbers, sizes, checksums), self.deadline_s, link=link)
        except BadArgument:  # after any other error they may have been named
            self._grants.give(link, extents, slots)
            raise
        self._collect_grants(link)
        for at, status in zip(new, statuses, strict=True):
            results[at] = _OF_COMMIT[status]
        return None if PutResult.LOST in results else results  # grants ran out of time: what is stored exists now

    def _ask_ahead(self, link: Link, extents: tuple[int, ...], most: int) -> None:
        """For as much again. It wakes the node, too, which will be asked to name this put's objects soon."""
        if self._grants.num_bytes + sum(extents) <= most:
            number = self._home.post(Grant(0, 0, extents), link, self.deadline_s)
            self._grants.note_posted(link, number, extents)

    def _take_grants(self, link: Link, extents: tuple[int, ...]) -> list[Slot] | None:
        slots = self._grants.take(link, extents)
        if slots is None:  # the first put, or one of another shape
            self._collect_grants(link)
            granted = slots_of(self._home.call(Grant(0, 0, extents), self.deadline_s, link=link))
            self._grants.give(link, extents, granted)
            slots = self._grants.take(link, extents)
        return slots

    def _collect_grants(self, link: Link) -> None:
        for number, extents in self._grants.take_posted(link):
            self._grants.give(link, extents, slots_of(self._home.collect(number, link, self.deadline_s)))

    def _put_reserved(self, keys: Sequence[bytes], buffers: Sequence[memoryview], *, strict: bool) -> list[PutResult]:
        checksums = tuple([contents.checksum(each) for each in buffers]) if strict else ()
        mode = PutMode.STRICT if strict else PutMode.EQUIVALENT
        puts, link = self._reserve(keys, [each.nbytes for each in buffers], mode, checksums)
        results = [_OF_PUT[status] for status in puts.statuses]
        new = [at for at, status in enumerate(puts.statuses) if status is _RESERVED]
        if new:
            for at, status in zip(new, self._fill(link, puts, new, buffers), strict=True):
                results[at] = _OF_COMMIT[status]
        return results

    def _reserve(
        self, keys: Sequence[bytes], sizes: Sequence[int], mode: PutMode, checksums: tuple[int, ...]
    ) -> tuple[Puts, Link]:
        request = Reserve(0, 0, tuple(keys), tuple(sizes), mode, checksums=checksums)
        return self._home.claim(request, self.deadline_s)

    def _fill(
        self, link: Link, puts: Puts, new: Sequence[int], buffers: Sequence[memoryview]
    ) -> tuple[CommitStatus, ...]:
        """Write and commit these; what goes wrong is given up."""
        numbers: tuple[int, ...] = tuple([puts.numbers[at] for at in new])  # type: ignore[misc]
        try:
            checksums = _write(link, [Piece(puts.offsets[at], buffers[at], puts.numbers[at]) for at in new])  # type: ignore[arg-type]
            return self._commit(link, numbers, checksums)
        except BaseException:
            self._cancel(link, numbers)
            raise

    def _commit_session(self, reservation: Reservation) -> PutResult:
        [result] = self._commit_written(reservation, [0])
        return result

    def _commit_written(self, reservation: Reservation, indices: Sequence[int]) -> list[PutResult]:
        reservation.mark(indices, Hold.CLOSED)
        checksums = reservation.written_checksums(indices)
        statuses = self._commit(reservation.link, reservation.numbers(indices), checksums)
        if self._directory is not None:
            self._home.sync(self.deadline_s)
        return [_OF_COMMIT[status] for status in statuses]

    def _commit(
        self, link: Link, numbers: tuple[int, ...], checksums: tuple[int | None, ...]
    ) -> tuple[CommitStatus, ...]:
        request = Commit(0, 0, numbers, False, checksums)
        statuses: tuple[CommitStatus, ...] = self._home.call(request, self.deadline_s, link=link)
        return statuses

    def _cancel(self, link: Link, numbers: tuple[int, ...]) -> None:
        """If the node cannot be told, it sees the connection end."""
        with contextlib.suppress(StoreUnavailable, DeadlineExceeded):
            self._home.call(Cancel(0, 0, numbers), self.deadline_s, link=link)

    # ------------------------------------------------------------ helpers

    def _local(self) -> LocalReader | None:
        """None if the home node cannot be reached, too: then whoever asks it hears why."""
        try:
            return self._home.link(self.deadline_s).local
        except StoreUnavailable:
            return None

    def _read(self, keys: Sequence[bytes], buffer_for: reading.BufferFor) -> list[int | Absent]:
        local = self._local()
        copied = local.copy_out(keys, buffer_for) if local is not None and keys else None
        if copied is not None:
            return list(copied)
        batch = reading.Read(keys, buffer_for)
        reading.read(self._home, self._directory, self._peers, batch, self.deadline_s)
        return batch.sizes

    def _directory_or_raise(self) -> DirectorySession:
        if self._directory is None:
            raise BadArgument("directory: this client was connected without one")
        return self._directory

    def _check_replicas(self, replicas: int) -> None:
        if not 1 <= replicas <= REPLICAS_MAX:
            raise BadArgument(f"replicas: must be 1 to {REPLICAS_MAX}, got {replicas}")
        if replicas > 1:
            self._directory_or_raise()


class LeasedView:
    """See `Store.view`. A class, as a generator takes longer than all the rest."""

    __slots__ = ("_deadline_s", "_home", "_key", "_local", "_objects", "_slot")

    def __init__(self, home: NodeSession, key: bytes, deadline_s: float) -> None:
        self._home = home
        self._key = key
        self._deadline_s = deadline_s
        self._objects: LeasedObjects | None = None
        self._local: LocalReader | None = None
        self._slot = 0

    def __enter__(self) -> memoryview | Absent:
        local = self._home.link(self._deadline_s).local
        opened = local.open(self._key) if local is not None else None
        if opened is not None:
            self._local = local
            view, self._slot = opened
            return view
        objects = self._objects = reading.lease(self._home, (self._key,), self._deadline_s)
        return objects.view(0) if objects.hits else Absent.MISS

    def __exit__(self, *exc: object) -> None:
        if self._local is not None:
            self._local.release((self._slot,))
        elif self._objects is not None:
            reading.release(self._home, self._objects, self._deadline_s)


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


class WriteBatch:
    """Objects that are being written. Of each, ranges may come in any order, but each only once and all before its commit.

    results: by key, what became of it; None while it is being written."""

    def __init__(
        self,
        reservation: Reservation,
        commit: Callable[[Reservation, Sequence[int]], list[PutResult]],
        cancel: Callable[[Link, tuple[int, ...]], None],
    ) -> None:
        self.results = [None if status is _RESERVED else _OF_PUT[status] for status in reservation.statuses]
        self._reservation = reservation
        self._commit = commit
        self._cancel = cancel

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        """Call `fill` with a buffer whose bytes become that range of object `index`; on the same machine the object itself."""
        self._reservation.fill(index, offset, size, fill)

    def commit(self, indices: Sequence[int]) -> list[PutResult]:
        """Of these, which are being written and are whole now."""
        results = self._commit(self._reservation, indices) if indices else []
        for at, result in zip(indices, results, strict=True):
            self.results[at] = result
        return results

    def close(self) -> None:
        """Give up what is not committed."""
        left = self._reservation.held(Hold.WRITING)
        self._reservation.mark(left, Hold.CLOSED)
        if left and self._reservation.link.lost is None:
            self._cancel(self._reservation.link, self._reservation.numbers(left))


def _write(link: Link, pieces: Sequence[Piece], near_end: Callable[[], None] | None = None) -> tuple[int, ...]:
    """Whole objects to where they are reserved; their checksums. near_end: called when only a last piece is left to be
    copied. Raises StoreError."""
    last_at = _first_of_last(pieces)
    checksums: list[int] = []
    with link.writing() as path:
        if isinstance(path, MappedPath):
            for at, (offset, local, _) in enumerate(pieces):
                target = path.view(offset, local.nbytes)
                checksums.append(contents.copy_hashed(target, local, near_end if at == last_at else None))
            return tuple(checksums)

        def hash_written(piece: Piece) -> None:
            if len(checksums) == last_at and near_end is not None:
                near_end()
            checksums.append(contents.checksum(piece.local))

        path.write(pieces, hash_written).wait()
        return tuple(checksums)


def _first_of_last(pieces: Sequence[Piece]) -> int:
    """The index of the first of those at the end that have no more than one contents.PIECE_BYTES together; or the last."""
    left = contents.PIECE_BYTES
    for at in range(len(pieces) - 1, -1, -1):
        left -= pieces[at].local.nbytes
        if left < 0:
            return min(at + 1, len(pieces) - 1)
    return 0


def _replicas(found: Found) -> list[list[Replica]]:
    return [
        [Replica(found.nodes[holder.node].name, holder.tier) for holder in found.sets.get(number, ())]
        for number in found.numbers
    ]


def _choose_home(nodes: Sequence[NodeInfo], name: str) -> NodeInfo:
    """One whose socket is on this machine, else one by a hash of the client's name: clients spread, and each stays."""
    if not nodes:
        raise StoreUnavailable("the directory knows no node")
    here = [info for info in nodes if any(_is_here(address) for address in info.addresses)]
    return max(here or nodes, key=lambda info: hashlib.blake2b(f"{name}/{info.name}".encode()).digest())


def _is_here(address: str) -> bool:
    return address.startswith("unix:") and os.path.exists(address[5:])
