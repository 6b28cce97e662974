"""The file of a node's SSD tier: <ssd_dir>/mooncake-<cluster>-<node>.ssd, mode 0600, locked by its node as long as it
lives.

Its space is allocated when it is made, so that a full disk is an error of the start and not of a write. It is written and
read directly, past the page cache, where the file system can do that: straight from and into the segment, at the disk's
own rate.

A file of another cluster or node is refused. One of ours of another version or geometry is begun anew: what it holds is a
cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from mooncake.core.errors import SegmentError
from mooncake.store.ssd_layout import PAGE_BYTES, Geometry, Page, unpack_table
from mooncake.transport.shm import segment_path

log = logging.getLogger(__name__)

HEADER_BYTES = 1 << 20
"""Extents begin at multiples of what disks and arrays of them work in. Only the first page is used."""
_HEADER = struct.Struct("<8sQ64s64s16sQQ")
_MAGIC = b"MOONSSD\0"
_VERSION = 1


class SsdHeader(msgspec.Struct, frozen=True):
    cluster: str
    node: str
    file_id: bytes
    extent_bytes: int
    table_bytes: int


class SsdFile:
    """Blocks. Offsets are those of the log. `read`, `write` and `sync` may come from any thread; they raise OSError."""

    def __init__(self, path: str, fd: int, file_id: bytes, geometry: Geometry) -> None:
        self.path = path
        self.file_id = file_id
        self.geometry = geometry
        self._fd = fd
        self.is_direct = _go_direct(fd)
        if not self.is_direct:
            log.warning("%s: no direct I/O on this file system; going through the page cache", path)

    @classmethod
    def open(cls, directory: str, cluster: str, node: str, geometry: Geometry) -> SsdFile:
        """Raises SegmentError; then nothing that was there is changed."""
        if geometry.page_bytes != PAGE_BYTES:
            raise SegmentError(f"alignment of the SSD must be {PAGE_BYTES}, got {geometry.page_bytes}")
        path = segment_path(cluster, node, directory) + ".ssd"
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SegmentError(f"cannot open {path}: {error.strerror}") from error
        try:
            _lock(path, fd)
            return cls(path, fd, _prepare(path, fd, cluster, node, geometry), geometry)
        except BaseException:
            os.close(fd)
            raise

    def tables(self) -> Iterator[Page]:
        """Of all extents, in the order of their places. What cannot be read is taken for empty."""
        geometry = self.geometry
        buffer = mmap.mmap(-1, geometry.table_bytes)
        for extent in range(geometry.num_extents):
            try:
                self.read([memoryview(buffer)], extent * geometry.extent_bytes)
            except OSError as error:
                log.warning("%s: the table of extent %d cannot be read: %s", self.path, extent, error)
                yield Page(0, ())
                continue
            yield unpack_table(bytes(buffer), self.file_id, extent, geometry)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """One behind the other. With direct I/O, views are aligned to pages and whole pages long."""
        self._transfer(os.pwritev, views, offset)

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        self._transfer(os.preadv, views, offset)

    def sync(self) -> None:
        """What was written outlasts a power failure."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _transfer(self, call: Callable[[int, Any, int], int], views: Sequence[memoryview], offset: int) -> None:
        while views:
            count = call(self._fd, views, HEADER_BYTES + offset)
            if count <= 0 or (self.is_direct and count % PAGE_BYTES):
                raise OSError(errno.EIO, f"{count} bytes were transferred at {offset}")
            offset += count
            views = _rest(views, count)


def _rest(views: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What is left of them behind the first `count` bytes."""
    for at, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[at + 1 :]]
        count -= view.nbytes
    return []


def _lock(path: str, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SegmentError(f"{path} is owned by a live process: choose another node name or stop it") from None


def _prepare(path: str, fd: int, cluster: str, node: str, geometry: Geometry) -> bytes:
    """Its file id, after a look at what is there. Raises SegmentError."""
    data = os.pread(fd, _HEADER.size, 0)
    header = _unpack(data)
    if header is None and data.strip(b"\0") and not data.startswith(_MAGIC):
        raise SegmentError(f"{path} is no file of an SSD tier: remove it or choose another folder")
    if header is not None and (header.cluster, header.node) != (cluster, node):
        raise SegmentError(
            f"{path} is of node {header.node} in cluster {header.cluster}, not of {node} in {cluster}: "
            "remove it or choose another folder"
        )
    _allocate(path, fd, HEADER_BYTES + geometry.capacity_bytes)
    if header is not None and (header.extent_bytes, header.table_bytes) == (
        geometry.extent_bytes,
        geometry.table_bytes,
    ):
        return header.file_id
    if data.startswith(_MAGIC):
        log.warning("%s has another version or extents of another size: its contents are given up", path)
    return _begin(path, fd, cluster, node, geometry)


def _begin(path: str, fd: int, cluster: str, node: str, geometry: Geometry) -> bytes:
    """A header with a new id, by which all tables that are there become void."""
    file_id = secrets.token_bytes(16)
    names = cluster.encode(), node.encode()
    header = _HEADER.pack(_MAGIC, _VERSION, *names, file_id, geometry.extent_bytes, geometry.table_bytes)
    try:
        os.pwrite(fd, header.ljust(PAGE_BYTES, b"\0"), 0)
        os.fsync(fd)
    except OSError as error:
        raise SegmentError(f"cannot write {path}: {error.strerror}") from error
    return file_id


def _unpack(data: bytes) -> SsdHeader | None:
    """None if it is none, or of another version."""
    if len(data) < _HEADER.size:
        return None
    magic, version, cluster, node, file_id, extent_bytes, table_bytes = _HEADER.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        return None
    return SsdHeader(_name(cluster), _name(node), file_id, extent_bytes, table_bytes)


def _name(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _allocate(path: str, fd: int, size: int) -> None:
    """Exactly so much."""
    stat, disk = os.fstat(fd), os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize + stat.st_blocks * 512
    try:
        if size <= free:
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, size)
            return
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, stat.st_size)
        if error.errno != errno.ENOSPC:
            raise SegmentError(f"cannot allocate {size} bytes for {path}: {error.strerror}") from error
    raise SegmentError(
        f"the disk is too small for {path}: it needs {size} bytes, {free} are free; lower the store's SSD"
    )


def _go_direct(fd: int) -> bool:
    """Whether the file is read and written past the page cache from now on. Some file systems accept the flag only."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [mmap.mmap(-1, PAGE_BYTES)], 0)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True
