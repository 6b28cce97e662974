"""Carries out the jobs of a node's SSD tier: between its segment and its SSD file, in threads, checksums included.

One thread writes and one reads, so that who waits for a read does not wait for a write behind the first. A third one
hashes what they transfer meanwhile: alone, a thread that does both would have the disk idle for a sixth of the time.
xxh3-64 of all contents goes to the table, and is compared with that of the client, if it gave one; what is read must have
that number again.

What a job writes is ordered so that a process that is killed at any moment leaves nothing wrong: contents, then the table
that speaks of them. A power failure may turn that order round, as the disk is told to keep what it has only once, at the
end of a job, before anybody hears that it is done. Then the checksums tell.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import xxhash

from mooncake.store.events import ReadSsd, SsdJob, SsdRead, SsdRecovered, SsdRun, SsdWritten, WriteSsd
from mooncake.store.ssd_file import SsdFile
from mooncake.store.ssd_layout import Entry, pack_page, pack_table, recovered

log = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20
"""Of one system call: from there on disks are as fast as they can be."""
_BATCH_VIEWS_MAX = 1024
"""IOV_MAX of Linux."""
_JOB_S = 30.0
"""A job that takes longer has failed. One that hangs in a system call cannot be helped: what it holds stays held."""


class _Closing(Exception):
    """Nobody waits for the job any more."""


class _Piece(NamedTuple):
    """at: index of the object. view: of whole pages; the first num_bytes are the object's."""

    at: int
    view: memoryview
    num_bytes: int


class _Batch(NamedTuple):
    """One system call: pieces that lie one behind the other on SSD."""

    offset: int
    pieces: list[_Piece]


class Moved:
    """What one thread has moved, and how long that took."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.seconds = 0.0

    def add(self, num_bytes: int, began: float) -> None:
        self.num_bytes += num_bytes
        self.seconds += time.monotonic() - began


class SsdJobs:
    """memory: the segment. on_done: gets the answers, in any thread. written, read_back: so far."""

    def __init__(self, file: SsdFile, memory: memoryview, on_done: Callable[[SsdWritten | SsdRead], None]) -> None:
        self._file = file
        self._memory = memory
        self._on_done = on_done
        self.written = Moved()
        self.read_back = Moved()
        self._closing = threading.Event()
        self._writer = ThreadPoolExecutor(1, "ssd-write")
        self._reader = ThreadPoolExecutor(1, "ssd-read")
        self._hasher = ThreadPoolExecutor(1, "ssd-hash")

    def recover(self) -> SsdRecovered:
        """What an earlier life left in the file. Blocks."""
        return recovered(self._file.tables())

    def submit(self, job: SsdJob) -> None:
        if isinstance(job, WriteSsd):
            self._writer.submit(self.write, job).add_done_callback(lambda done: self._finish(job, done))
        elif isinstance(job, ReadSsd):
            self._reader.submit(self.read, job).add_done_callback(lambda done: self._finish(job, done))

    def close(self) -> None:
        """Ends what is under way after its system call; its objects are not answered for. Blocks for that."""
        self._closing.set()
        for threads in (self._writer, self._reader, self._hasher):
            threads.shutdown(cancel_futures=True)
        self._file.close()

    def _finish(self, job: SsdJob, done: Future[Any]) -> None:
        if done.cancelled() or self._closing.is_set():
            return
        error = done.exception()
        if error is None:
            self._on_done(done.result())
            return
        log.error("job %d of the SSD tier failed", job.job, exc_info=error)
        everything = tuple(range(len(job.keys)))
        kind = SsdWritten if isinstance(job, WriteSsd) else SsdRead
        self._on_done(kind(job.job, everything))

    # ------------------------------------------------------------ writes

    def write(self, job: WriteSsd) -> SsdWritten:
        hashing = self._hasher.submit(_checksums, job, self._memory)
        failed: list[int] = []
        first, began = 0, time.monotonic()
        until = began + _JOB_S
        for run in job.runs:
            part = range(first, first + run.count)
            first += run.count
            try:
                self._write_run(job, run, part, hashing, until)
            except OSError as error:
                log.warning("%s: %d objects could not be written: %s", self._file.path, run.count, error)
                failed += part
        checksums = hashing.result()  # nobody looks at the job's memory any more
        corrupt = _differing(job, checksums)
        if corrupt:
            log.error("%d objects in memory were corrupt and are not written to SSD", len(corrupt))
        try:
            self._file.sync()
        except OSError as error:
            log.warning("%s: what was written may be lost: %s", self._file.path, error)
            failed = list(range(len(job.keys)))
        self.written.add(sum(job.sizes), began)
        return SsdWritten(job.job, tuple([at for at in failed if at not in corrupt]), tuple(corrupt), tuple(checksums))

    def _write_run(
        self, job: WriteSsd, run: SsdRun, part: Sequence[int], hashing: Future[list[int]], until: float
    ) -> None:
        file = self._file
        if run.opens:
            page = pack_page(file.file_id, run.sequence, run.extent)
            file.write([_aligned(page)], run.extent * file.geometry.extent_bytes)
        for batch in self._batches(job, part):
            self._check(until)
            file.write([piece.view for piece in batch.pieces], batch.offset)
        checksums = hashing.result()
        corrupt = _differing(job, checksums)
        entries = [
            Entry(job.keys[at], job.ssd_offsets[at], job.sizes[at], checksums[at]) for at in part if at not in corrupt
        ]
        if entries:
            file.write([_aligned(pack_table(file.file_id, run.sequence, run.extent, entries))], run.table_offset)

    # ------------------------------------------------------------ reads

    def read(self, job: ReadSsd) -> SsdRead:
        """Hashed batch by batch, while the next is read."""
        failed: dict[int, OSError] = {}
        hashes = [xxhash.xxh3_64() for _ in job.keys]
        hashing: list[Future[None]] = []
        began = time.monotonic()
        until = began + _JOB_S
        in_order = sorted(range(len(job.keys)), key=job.ssd_offsets.__getitem__)
        for batch in self._batches(job, in_order):
            failed |= self._read_batch(batch, until)
            hashing.append(self._hasher.submit(_update, hashes, batch.pieces))
        for batch_hashed in hashing:
            batch_hashed.result()
        if failed:
            log.warning(
                "%s: %d objects could not be read: %s", self._file.path, len(failed), next(iter(failed.values()))
            )
        self.read_back.add(sum(job.sizes), began)
        corrupt = [at for at in _differing(job, [each.intdigest() for each in hashes]) if at not in failed]
        if corrupt:
            log.error("%s: %d objects were corrupt and are dropped", self._file.path, len(corrupt))
        return SsdRead(job.job, tuple(sorted(failed)), tuple(corrupt))

    def _read_batch(self, batch: _Batch, until: float) -> dict[int, OSError]:
        """Why objects could not be read, by index. One bad place on the disk is no reason to lose what lies beside it."""
        try:
            self._check(until)
            self._file.read([piece.view for piece in batch.pieces], batch.offset)
        except OSError as error:
            if len(batch.pieces) == 1 or error.errno == errno.ETIMEDOUT:
                return {piece.at: error for piece in batch.pieces}
        else:
            return {}
        failed: dict[int, OSError] = {}
        offset = batch.offset
        for piece in batch.pieces:
            failed |= self._read_batch(_Batch(offset, [piece]), until)
            offset += piece.view.nbytes
        return failed

    # ------------------------------------------------------------ both

    def _check(self, until: float) -> None:
        if self._closing.is_set():
            raise _Closing
        if time.monotonic() > until:
            raise OSError(errno.ETIMEDOUT, f"not done within {_JOB_S:g} s")

    def _batches(self, job: SsdJob, indices: Sequence[int]) -> Iterator[_Batch]:
        """indices: in the order of their places on SSD. The last piece of an object has what its page has beside it too."""
        batch, left = _Batch(0, []), 0
        for at in indices:
            start, below, size = job.offsets[at], job.ssd_offsets[at], job.sizes[at]
            done, padded = 0, self._file.geometry.rounded(size)
            while done < padded:
                is_next = below + done == batch.offset + BATCH_BYTES - left
                if not left or not is_next or len(batch.pieces) == _BATCH_VIEWS_MAX:
                    if batch.pieces:
                        yield batch
                    batch, left = _Batch(below + done, []), BATCH_BYTES
                count = min(padded - done, left)
                view = self._memory[start + done : start + done + count]
                batch.pieces.append(_Piece(at, view, min(count, size - done)))
                done, left = done + count, left - count
        if batch.pieces:
            yield batch


def _checksums(job: WriteSsd, memory: memoryview) -> list[int]:
    places = zip(job.offsets, job.sizes, strict=True)
    return [xxhash.xxh3_64_intdigest(memory[offset : offset + size]) for offset, size in places]


def _differing(job: SsdJob, checksums: Sequence[int]) -> list[int]:
    pairs = enumerate(zip(job.checksums, checksums, strict=True))
    return [at for at, (wanted, found) in pairs if wanted is not None and wanted != found]


def _update(hashes: Sequence[Any], pieces: Sequence[_Piece]) -> None:
    for piece in pieces:
        hashes[piece.at].update(piece.view[: piece.num_bytes])


def _aligned(data: bytes) -> memoryview:
    """Direct I/O wants whole pages of memory too."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return memoryview(buffer)
