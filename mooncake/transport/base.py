"""One-sided access to another process's memory: register, then read and write without the owner's program taking part.

The owner registers a buffer and gives out its `Region`. A peer opens a `Path` to it and reads or writes batches of
pieces; it owns the local buffers and keeps them until the completion says that the transfer is over. A path that raised
is broken for that batch only: whether to try it again, or another, is the caller's decision.

`memory` reaches a buffer of the same process, `shm` one of the same machine, `tcp` any. RDMA has the same shape: a
region with a remote key, a path with queue pairs, a completion that waits for the notification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from mooncake.core.errors import OutOfRange

COPY_WITHOUT_GIL_BYTES = 16 * 1024
"""From here on numpy's copy, which releases the GIL, beats assigning to a memoryview, which holds it (FACTS 6)."""


def copy(target: memoryview, source: memoryview) -> None:
    """Of the same size."""
    if source.nbytes < COPY_WITHOUT_GIL_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class Region(msgspec.Struct, frozen=True):
    """A registered buffer, as its owner describes it to peers. handle: what the transport needs to find it, such as a
    path in shared memory or an address. device: cpu, or a device's name."""

    transport: str
    handle: str
    size: int
    device: str = "cpu"


class Piece(NamedTuple):
    """One contiguous range. claim: the right by which the serving side allows it, if it checks (the store's object
    number)."""

    offset: int
    local: memoryview
    claim: int = 0


Each = Callable[[Piece], None]


class Registration(Protocol):
    """Owner's side: the buffer stays valid and registered until `close`."""

    region: Region
    buffer: memoryview

    def close(self) -> None: ...


class Completion(Protocol):
    def wait(self) -> None:
        """Blocks until the batch is over. Raises TransportError if it failed; then any part of it may have been
        done."""
        ...


class Path(Protocol):
    """Peer's side. Methods block at most the path's time limit and may be called from several threads at once."""

    region: Region

    def read(self, pieces: Sequence[Piece], each: Each | None = None) -> Completion:
        """From the region into the local buffers (writable, contiguous bytes). each: called with every piece as soon as it is
        there, in order, while others are still on their way."""
        ...

    def write(self, pieces: Sequence[Piece], each: Each | None = None) -> Completion:
        """From the local buffers into the region. each: called with every piece when it is on its way."""
        ...

    def view(self, offset: int, size: int) -> memoryview | None:
        """The range itself, writable, if the path has it mapped; None if it can only be copied."""
        ...

    def close(self) -> None: ...


class Done:
    """The completion of paths whose calls return when the transfer is over."""

    def wait(self) -> None:
        pass


DONE = Done()


class MappedPath:
    """A path to a region that lies in this process's address space; what `memory` and `shm` have in common."""

    def __init__(self, region: Region, buffer: memoryview) -> None:
        self.region = region
        self._buffer = buffer

    def read(self, pieces: Sequence[Piece], each: Each | None = None) -> Completion:
        for piece in pieces:
            copy(piece.local, self.view(piece.offset, piece.local.nbytes))
            if each is not None:
                each(piece)
        return DONE

    def write(self, pieces: Sequence[Piece], each: Each | None = None) -> Completion:
        for piece in pieces:
            copy(self.view(piece.offset, piece.local.nbytes), piece.local)
            if each is not None:
                each(piece)
        return DONE

    def view(self, offset: int, size: int) -> memoryview:
        if offset < 0 or offset + size > self.region.size:
            raise OutOfRange(f"[{offset}, {offset + size}) is outside of a region of {self.region.size} bytes")
        return self._buffer[offset : offset + size]

    def close(self) -> None:
        """The mapping itself goes with its last view."""
