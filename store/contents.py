"""Bytes into objects and out of them, with their checksums: xxh3-64 of the whole object.

Copied and hashed piece by piece, so that a piece is hashed while it is in the cache: hashing whole objects afterwards costs a
quarter of the speed of a copy, this a tenth. Both release the GIL.

Below some 800 KiB the C library copies by one string instruction, which is the quickest way where the target begins with a
cache line, and may run at half its speed where it does not, as numpy arrays do not. So there, pieces are longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from mooncake.core.errors import BadArgument
from mooncake.transport.base import COPY_WITHOUT_GIL_BYTES

PIECE_BYTES = 1 << 19
_LONG_PIECE_BYTES = 1 << 20
_LINE_BYTES = 64
_digest = xxhash.xxh3_64_intdigest


def as_bytes(data: Any, name: str, *, writable: bool = False) -> memoryview:
    """As a flat view. Raises BadArgument, which calls it by that name, if it is no contiguous buffer, or empty."""
    try:
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
    except TypeError as error:
        raise BadArgument(f"{name}: must be a C-contiguous buffer: {error}") from None
    if not view.nbytes:
        raise BadArgument(f"{name}: is empty; an object has at least one byte")
    if writable and view.readonly:
        raise BadArgument(f"{name}: the buffer is read-only")
    return view


def copy_hashed(target: memoryview, source: memoryview, near_end: Callable[[], None] | None = None) -> int:
    """The checksum of what was copied; both are of the same size. near_end: called before the last piece."""
    size = source.nbytes
    if size <= PIECE_BYTES and near_end is not None:
        near_end()
    if size < COPY_WITHOUT_GIL_BYTES:
        target[:] = source
        return _digest(source)
    into, data = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    if size <= PIECE_BYTES:
        np.copyto(into, data)
        return _digest(source)
    piece_bytes = _LONG_PIECE_BYTES if into.ctypes.data % _LINE_BYTES else PIECE_BYTES
    state = xxhash.xxh3_64()
    for start in range(0, size, piece_bytes):
        if start + piece_bytes >= size and near_end is not None:
            near_end()
        piece = data[start : start + piece_bytes]
        np.copyto(into[start : start + piece_bytes], piece)
        state.update(piece.data)
    return state.intdigest()


class RunningChecksum:
    """Of an object whose ranges come in order, as layers do. If they do not, it knows none. For any number of threads."""

    __slots__ = ("_lock", "_next", "_state")

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self._next = 0
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        with self._lock:
            if offset == self._next:
                self._state.update(data)
                self._next += data.nbytes
            else:
                self._next = -1

    def digest(self, size: int) -> int | None:
        """Of the whole object of that size, if all of it came."""
        with self._lock:
            return self._state.intdigest() if self._next == size else None


def checksum(data: memoryview) -> int:
    return _digest(data)
