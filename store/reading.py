"""How a blocking client reads: at its home node first, then wherever the directory says that replicas are."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence

from mooncake.core.errors import Damaged, DeadlineExceeded, StoreUnavailable
from mooncake.core.messages import NodeInfo
from mooncake.store.directory.core import Found
from mooncake.store.directory.session import DirectorySession
from mooncake.store.events import Lease, Release, Remove
from mooncake.store.handles import Hold, LeasedObjects
from mooncake.store.peers import Peers
from mooncake.store.session import NodeSession
from mooncake.store.types import Places

ATTEMPT_S = 0.15
"""How long a read waits for a node while there is another one to ask."""
LAST_ATTEMPT_S = 0.4
"""And for the last one: what a node that is stopped holds is a miss."""


class Absent(enum.Enum):
    """Why there are no bytes. Both are false."""

    MISS = 0
    UNKNOWN = 1
    """The directory began anew and has not heard of all nodes yet."""

    def __bool__(self) -> bool:
        return False


BufferFor = Callable[[int, int], memoryview]
"""Where the object goes that belongs to key `index` and has so many bytes."""


def lease(session: NodeSession, keys: Sequence[bytes], deadline_s: float) -> LeasedObjects:
    """Raises StoreError; `release` gives them back."""
    link = session.link(deadline_s)
    leased = link.local.lease(keys) if link.local is not None else None
    if leased is not None:
        return LeasedObjects.found(link, *leased)
    places: Places
    places, link = session.claim(Lease(0, 0, tuple(keys)), deadline_s)
    return LeasedObjects.placed(link, places)


def release(session: NodeSession, objects: LeasedObjects, deadline_s: float) -> None:
    """A node that cannot be told sees the connection end."""
    held = objects.held(Hold.LEASED)
    objects.mark(held, Hold.CLOSED)
    if objects.slots is not None and objects.link.local is not None:
        objects.link.local.release([objects.slots[at] for at in held])
    elif held and objects.link.lost is None:
        with contextlib.suppress(StoreUnavailable, DeadlineExceeded):
            session.call(Release(0, 0, objects.numbers(held)), deadline_s, link=objects.link)


@contextlib.contextmanager
def leased(session: NodeSession, keys: Sequence[bytes], deadline_s: float) -> Iterator[LeasedObjects]:
    objects = lease(session, keys, deadline_s)
    try:
        yield objects
    finally:
        release(session, objects, deadline_s)


class Read:
    """One batch. sizes: by key, what was read; rest: indices of keys that were not."""

    def __init__(self, keys: Sequence[bytes], buffer_for: BufferFor) -> None:
        self.sizes: list[int | Absent] = [Absent.MISS] * len(keys)
        self.rest: list[int] = list(range(len(keys)))
        self._keys = keys
        self._buffer_for = buffer_for

    def keys(self) -> list[bytes]:
        return [self._keys[at] for at in self.rest]

    def read_from(self, session: NodeSession, indices: Sequence[int], deadline_s: float) -> None:
        """Those of these that the node has. A damaged object is a miss, and gone. Raises StoreUnavailable, DeadlineExceeded."""
        keys = [self._keys[at] for at in indices]
        with leased(session, keys, deadline_s) as objects:
            hits = [(at, place.size) for at, place in enumerate(objects.locations) if place is not None]
            damaged: tuple[int, ...] = ()
            try:
                objects.read_batch([(at, 0, self._buffer_for(indices[at], size)) for at, size in hits])
            except Damaged as error:
                damaged = error.indices
                session.call(Remove(0, 0, tuple([keys[at] for at in damaged]), damaged=True), deadline_s)
        for at, size in hits:
            if at not in damaged:
                self.sizes[indices[at]] = size
        self.rest = [at for at in self.rest if not isinstance(self.sizes[at], int)]


def read(
    home: NodeSession,
    directory: DirectorySession | None,
    peers: Peers,
    batch: Read,
    deadline_s: float,
) -> None:
    """Raises StoreUnavailable or DeadlineExceeded if nobody can be asked; a replica that cannot be reached is a miss."""
    home_name = ""
    try:
        batch.read_from(home, batch.rest, deadline_s if directory is None else ATTEMPT_S)
        home_name = home.node_name(deadline_s)
    except (StoreUnavailable, DeadlineExceeded):
        if directory is None:
            raise
    if not batch.rest or directory is None:
        return
    found = directory.find(batch.keys(), deadline_s)
    left = {
        at: _in_order(found, number, home_name, peers) for at, number in zip(batch.rest, found.numbers, strict=True)
    }
    for at, number in zip(batch.rest, found.numbers, strict=True):
        if found.unknown and number not in found.sets:
            batch.sizes[at] = Absent.UNKNOWN
    while any(left.values()):
        _read_once(batch, peers, left)
        left = {at: nodes for at, nodes in left.items() if at in batch.rest}


def _read_once(batch: Read, peers: Peers, left: dict[int, list[NodeInfo]]) -> None:
    """From the first node of each key, which is left no more."""
    groups: dict[tuple[str, int], list[int]] = {}
    infos: dict[tuple[str, int], NodeInfo] = {}
    for at, nodes in left.items():
        if nodes:
            info = nodes.pop(0)
            infos[info.name, info.epoch] = info
            groups.setdefault((info.name, info.epoch), []).append(at)
    for node, indices in groups.items():
        limit_s = ATTEMPT_S if any(left[at] for at in indices) else LAST_ATTEMPT_S
        try:
            batch.read_from(peers.session(infos[node]), indices, limit_s)
        except (StoreUnavailable, DeadlineExceeded):
            peers.failed(infos[node].name)


def _in_order(found: Found, number: int, home: str, peers: Peers) -> list[NodeInfo]:
    """Nodes to ask, the home node apart: memory before SSD, and those that failed a moment ago last."""
    nodes = [found.nodes[holder.node] for holder in found.sets.get(number, ())]
    others = dict.fromkeys([info for info in nodes if info.name != home])
    return sorted(others, key=lambda info: peers.is_resting(info.name))
