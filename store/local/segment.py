"""A node's segment with its index: a new one, or that of a life before with all that was committed in it."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from mooncake.store.allocator import Allocator
from mooncake.store.events import Adopted
from mooncake.store.local.index import IndexWriter, index_bytes, num_entries_for
from mooncake.store.local.memory import ordered
from mooncake.store.local.readers import LocalReaders
from mooncake.transport.shm import HEADER_BYTES, SHM_DIR, ShmSegment

log = logging.getLogger(__name__)

ADOPT_S = 2.0
"""How long clients of the life before may take to end what they are copying. Who takes longer keeps the old memory, and the
node begins with an empty one."""
_POLL_S = 0.005


class Taken(NamedTuple):
    """readers: None where the read path does not work; adopted: what was found."""

    segment: ShmSegment
    readers: LocalReaders | None
    adopted: Adopted | None


def take_segment(cluster: str, node: str, epoch: int, capacity: int, alignment: int, directory: str = SHM_DIR) -> Taken:
    """Blocks, see `ShmSegment.create`. Raises SegmentError."""
    if not ordered():
        return Taken(ShmSegment.create(cluster, node, epoch, capacity, directory), None, None)
    num_entries = num_entries_for(capacity)
    front_bytes = -(-index_bytes(num_entries) // HEADER_BYTES) * HEADER_BYTES
    segment = ShmSegment.adopt(cluster, node, epoch, capacity, directory, front_bytes=front_bytes)
    if segment is not None:
        readers = LocalReaders(IndexWriter(segment.front, num_entries), segment.path)
        adopted = _adopted(segment, readers, alignment)
        if adopted is not None:
            readers.index.format()
            return Taken(segment, readers, adopted)
        readers.close()
        segment.close()
    segment = ShmSegment.create(cluster, node, epoch, capacity, directory, front_bytes=front_bytes)
    readers = LocalReaders(IndexWriter(segment.front, num_entries), segment.path)
    readers.index.format()
    return Taken(segment, readers, None)


def _adopted(segment: ShmSegment, readers: LocalReaders, alignment: int) -> Adopted | None:
    """What can be kept, or None if the memory is not safe to use."""
    readers.index.fence()  # our epoch first, then their copies: see ClientTable.begin_copy
    readers.attach_all()
    found = sorted(readers.index.listed(), key=lambda pair: pair[1].number)
    known = {each.number for _, each in found}
    until = time.monotonic() + ADOPT_S
    while readers.num_copies or readers.claimed_numbers() - known:
        if time.monotonic() > until:
            log.warning("%s is not adopted: clients are still using it", segment.path)
            return None
        time.sleep(_POLL_S)
        readers.drop_abandoned()
    rounded = Allocator(segment.header.capacity, alignment)
    extents = {each.offset: rounded.rounded(each.size) for _, each in found}
    try:
        if len(extents) < len(found):
            raise ValueError("two objects at one place")
        rounded.occupy(extents)
    except ValueError as error:
        log.warning("%s is not adopted: its index is damaged: %s", segment.path, error)
        return None
    return Adopted(
        tuple([key for key, _ in found]),
        tuple([each.size for _, each in found]),
        tuple([each.offset for _, each in found]),
        tuple([each.number for _, each in found]),
        tuple([each.checksum for _, each in found]),
        tuple([readers.index.owner(each.row) for _, each in found]),
    )
