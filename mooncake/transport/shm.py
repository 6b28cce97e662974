"""Segments in shared memory: one file per store node, created and locked by its owner, mapped by everyone on the
machine.

    /dev/shm/mooncake-<cluster>-<node>    mode 0600
    ├── header page: magic, version, cluster, node, epoch, capacity, front bytes
    ├── the front: as many bytes as the owner wants for tables of its own
    └── capacity bytes; offset 0 of the region is the first of them

The owner holds an exclusive flock for its life. An unlocked file is stale: its owner died. A new owner of the same name may
*adopt* it with all that is in it, under a new epoch; then it must see to it that those who have it mapped since the old one do
not write any more. Otherwise it is unlinked and a new one made, so that they cannot write into that.
Space is allocated and mapped before use: a page that is missing later would be a SIGBUS, and a first touch runs at a
tenth of the speed of a copy. Each process populates its own mapping.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path as FilePath

import msgspec
import numpy as np

from mooncake.core.errors import SegmentError
from mooncake.transport.base import MappedPath, Region

SHM_DIR = "/dev/shm"
HEADER_BYTES = 4096
_HEADER = struct.Struct("<8sQ64s64sQQQ")
_EPOCH_WORD = 18
"""Of the header, in words of 8 bytes."""
_MAGIC = b"MOONSEG\0"
_VERSION = 2
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")
_CREATE_ATTEMPTS = 10
_MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module has no names for them
_MADV_POPULATE_WRITE = 23


class SegmentHeader(msgspec.Struct, frozen=True):
    cluster: str
    node: str
    epoch: int
    capacity: int
    front_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.front_bytes + self.capacity


class ShmSegment:
    """The owner's side: a Registration. `close` unlinks the file; mappings of others stay valid until they drop
    them. front: the owner's own bytes, beside the region."""

    def __init__(self, path: str, fd: int, header: SegmentHeader, *, adopted: bool) -> None:
        self.path = path
        self.header = header
        self.adopted = adopted
        self.region = Region("shm", path, header.capacity)
        self._fd = fd
        self._map = _map(path, fd, header)
        _populate(self._map, writable=not adopted)
        self.front, self.buffer = _front_and_buffer(self._map, header)

    @classmethod
    def create(
        cls, cluster: str, node: str, epoch: int, capacity: int, directory: str = SHM_DIR, *, front_bytes: int = 0
    ) -> ShmSegment:
        """Blocks while the pages are made, about a second per GiB. front_bytes: whole pages. Raises SegmentError."""
        path = segment_path(cluster, node, directory)
        if capacity <= 0:
            raise SegmentError(f"capacity must be positive, got {capacity}")
        fd = _create_locked(path)
        header = SegmentHeader(cluster, node, epoch, capacity, front_bytes)
        try:
            _allocate(fd, header.file_bytes, directory)
            os.pwrite(fd, _pack(header), 0)
            return cls(path, fd, header, adopted=False)
        except BaseException:
            os.unlink(path)
            os.close(fd)
            raise

    @classmethod
    def adopt(
        cls, cluster: str, node: str, epoch: int, capacity: int, directory: str = SHM_DIR, *, front_bytes: int = 0
    ) -> ShmSegment | None:
        """What a dead owner of that name has left, if it is of the same shape; from now on its epoch is the new one."""
        path = segment_path(cluster, node, directory)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        header = SegmentHeader(cluster, node, epoch, capacity, front_bytes)
        try:
            if try_lock(fd) and _is_shaped_like(fd, header) and _leads_to(path, fd):
                os.pwrite(fd, _pack(header), 0)
                return cls(path, fd, header, adopted=True)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def close(self) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self._fd)
        self._fd = -1
        with contextlib.suppress(BufferError):  # someone still has a view of it; the mapping goes with that
            self.front.release()
            self.buffer.release()
            self._map.close()


class ShmPath(MappedPath):
    """A peer's side. front: the owner's tables, to be read."""

    def __init__(self, region: Region, mapped: mmap.mmap, header: SegmentHeader) -> None:
        self.front, buffer = _front_and_buffer(mapped, header)
        super().__init__(region, buffer)
        self._words = memoryview(mapped)[:HEADER_BYTES].cast("Q")

    @property
    def epoch(self) -> int:
        """Of the owner now, or of the last one."""
        return self._words[_EPOCH_WORD]


def open_segment(region: Region, epoch: int) -> ShmPath:
    """Map a segment of this machine, read and write, every page present. Blocks for it: call it in a thread.

    Raises SegmentError if it is not there, not ours, or of another life than `epoch`."""
    try:
        fd = os.open(region.handle, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"cannot open segment {region.handle}: {error.strerror}") from error
    try:
        header = _read_header(fd)
        if header is None or header.epoch != epoch or header.capacity != region.size:
            raise SegmentError(f"segment {region.handle} is not of epoch {epoch} with {region.size} bytes: {header}")
        mapped = _map(region.handle, fd, header)
    finally:
        os.close(fd)
    _populate(mapped, writable=False)
    return ShmPath(region, mapped, header)


def segment_path(cluster: str, node: str, directory: str = SHM_DIR) -> str:
    for what, name in (("cluster", cluster), ("node", node)):
        if not _NAME.fullmatch(name):
            raise SegmentError(f"{what} must be 1 to 60 letters, digits, dots, dashes or underscores, got {name!r}")
    return f"{directory}/mooncake-{cluster}-{node}"


def cleanup_stale(cluster: str, directory: str = SHM_DIR) -> list[str]:
    """Unlink the segments of this cluster whose owners are dead; returns their paths."""
    removed = []
    for path in sorted(FilePath(directory).glob(f"mooncake-{cluster}-*")):
        with _opened(str(path)) as fd:
            if fd is None or not try_lock(fd):
                continue
            header = _read_header(fd)
            if header is None or header.cluster == cluster:  # no header: its owner died while making it
                path.unlink(missing_ok=True)
                removed.append(str(path))
    return removed


def _create_locked(path: str) -> int:
    """A new, empty file at `path` whose lock we hold. Another starter may see it before it is locked and unlink it as
    stale: then the path no longer leads to our file, and we try again."""
    for _ in range(_CREATE_ATTEMPTS):
        with _opened(path) as stale:
            if stale is not None:
                if not try_lock(stale):
                    raise SegmentError(
                        f"segment {path} is owned by a live process: choose another node name or stop it"
                    )
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise SegmentError(f"cannot create segment {path}: {error.strerror}") from error
        if try_lock(fd) and _leads_to(path, fd):
            return fd
        os.close(fd)
    raise SegmentError(f"cannot create segment {path}: other processes keep replacing it")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int | None]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise SegmentError(f"cannot open segment {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _allocate(fd: int, size: int, directory: str) -> None:
    stats = os.statvfs(directory)
    free = stats.f_bavail * stats.f_frsize
    if size <= free:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise SegmentError(f"cannot allocate {size} bytes in {directory}: {error.strerror}") from error
    raise SegmentError(
        f"{directory} is too small: the segment needs {size} bytes, {free} are free; lower the store's memory"
    )


def _map(path: str, fd: int, header: SegmentHeader) -> mmap.mmap:
    try:
        return mmap.mmap(fd, header.file_bytes)
    except (OSError, ValueError) as error:
        raise SegmentError(f"cannot map {header.file_bytes} bytes of segment {path}: {error}") from error


def _front_and_buffer(mapped: mmap.mmap, header: SegmentHeader) -> tuple[memoryview, memoryview]:
    memory, front_end = memoryview(mapped), HEADER_BYTES + header.front_bytes
    return memory[HEADER_BYTES:front_end], memory[front_end:]


def _populate(mapped: mmap.mmap, *, writable: bool) -> None:
    """writable: the pages may be overwritten, where there is no other way."""
    for advice in (_MADV_POPULATE_WRITE, _MADV_POPULATE_READ):
        with contextlib.suppress(OSError):
            mapped.madvise(advice)
            return
    pages = np.frombuffer(mapped, np.uint8)[HEADER_BYTES :: mmap.PAGESIZE]
    if writable:
        pages[:] = 0
    else:
        pages.max(initial=0)  # reading is enough to map a page, and cannot undo what a writer is doing


def _pack(header: SegmentHeader) -> bytes:
    names = header.cluster.encode(), header.node.encode()
    return _HEADER.pack(_MAGIC, _VERSION, *names, header.epoch, header.capacity, header.front_bytes)


def _is_shaped_like(fd: int, header: SegmentHeader) -> bool:
    found, status = _read_header(fd), os.fstat(fd)
    same = found is not None and msgspec.structs.replace(found, epoch=header.epoch) == header
    return same and status.st_size == header.file_bytes and status.st_uid == os.getuid()


def _read_header(fd: int) -> SegmentHeader | None:
    data = os.pread(fd, _HEADER.size, 0)
    if len(data) < _HEADER.size:
        return None
    magic, version, cluster, node, *rest = _HEADER.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        return None
    return SegmentHeader(cluster.rstrip(b"\0").decode(), node.rstrip(b"\0").decode(), *rest)
