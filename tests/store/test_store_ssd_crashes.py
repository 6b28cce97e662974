"""A node that is killed at any byte of what it writes to SSD: what it had said to be there is there, and nothing that is
wrong.

The core and the shell of the SSD tier write to a real file, and every write is recorded. Then the disk is made again as
it was in the middle of each of them, and recovered.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import xxhash

from mooncake.store.core import StoreCore
from mooncake.store.events import (
    Command,
    Commit,
    Event,
    Lease,
    ReadSsd,
    Release,
    Remove,
    Reply,
    Reserve,
    SsdJob,
    WriteSsd,
)
from mooncake.store.ssd import SsdConfig
from mooncake.store.ssd_file import SsdFile
from mooncake.store.ssd_jobs import SsdJobs
from mooncake.store.ssd_layout import PAGE_BYTES, recovered, unpack_table
from mooncake.store.types import Places, Puts
from tests.store.helpers import key

MEMORY = 24 * PAGE_BYTES
EXTENT = (16 + 12) * PAGE_BYTES
SSD = SsdConfig(5 * EXTENT, extent_bytes=EXTENT, ready_bytes=8 * PAGE_BYTES, job_bytes=6 * PAGE_BYTES)
NUM_KEYS = 40
SIZE_MAX = 5 * PAGE_BYTES
CUTS = (1, 511, 512, 4095, 4096, 4097)
"""Bytes of a write that are done; and as many from its end, and its half."""


class Write(NamedTuple):
    """known: what the node had said to be on SSD, and had not taken back when it wrote this."""

    offset: int
    data: bytes
    known: frozenset[bytes]


class RecordedFile(SsdFile):
    writes: list[Write]
    known: frozenset[bytes]

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        super().write(views, offset)
        self.writes.append(Write(offset, b"".join(views), self.known))


class Life:
    """Of a node without sockets: what the core says is done at once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.core = StoreCore(MEMORY, epoch=1, ssd=SSD)
        self.memory = memoryview(mmap.mmap(-1, MEMORY))
        file = RecordedFile.open(str(folder), "test", "n0", SSD.geometry)
        assert isinstance(file, RecordedFile)
        self.file = file
        self.file.writes, self.file.known = [], frozenset()
        self.jobs = SsdJobs(file, self.memory, lambda event: None)
        self.tell(self.jobs.recover())

    def tell(self, event: Event) -> list[Command]:
        commands = self.core.handle(event, 0)
        replies = [command for command in commands if not isinstance(command, SsdJob)]
        for job in commands:
            if isinstance(job, WriteSsd):
                self.file.known = frozenset(self.core._ssd.log.copies)
                replies += self.tell(self.jobs.write(job))
            elif isinstance(job, ReadSsd):
                replies += self.tell(self.jobs.read(job))
        return replies

    def ask(self, event: Event) -> object:
        [reply] = [command for command in self.tell(event) if isinstance(command, Reply)]
        return reply.results

    def step(self) -> None:
        name = key(self.rng.randrange(NUM_KEYS))
        found = self.ask(Lease(1, 0, (name,)))
        assert isinstance(found, Places)
        [place] = found.locations()
        if place is not None:
            assert bytes(self.memory[place.offset : place.offset + place.size]) == contents(name)
            self.ask(Release(1, 0, (place.generation,)))
            if self.rng.random() < 0.05:
                self.ask(Remove(1, 0, (name,)))
            return
        data = contents(name)
        made = self.ask(Reserve(1, 0, (name,), (len(data),)))
        assert isinstance(made, Puts)
        [place] = made.locations()
        assert place is not None
        self.memory[place.offset : place.offset + place.size] = data
        self.ask(Commit(1, 0, (place.generation,)))


def contents(name: bytes) -> bytes:
    rng = random.Random(name)
    return rng.randbytes(rng.randrange(1, SIZE_MAX))


def cuts(size: int) -> Iterator[int]:
    yield from sorted({cut for near in CUTS for cut in (near, size - near) if 0 < cut < size} | {0, size // 2, size})


def check(image: bytearray, file_id: bytes, known: frozenset[bytes]) -> int:
    """How many objects were found."""
    geometry = SSD.geometry
    tables = [
        unpack_table(bytes(image[at : at + geometry.table_bytes]), file_id, number, geometry)
        for number, at in enumerate(range(0, geometry.capacity_bytes, geometry.extent_bytes))
    ]
    found = recovered(tables)
    assert known <= set(found.keys), "an object that was on SSD is lost"
    for name, size, offset, checksum in zip(found.keys, found.sizes, found.ssd_offsets, found.checksums, strict=True):
        data = contents(name)
        assert image[offset : offset + size] == data and checksum == xxhash.xxh3_64_intdigest(data), "a wrong object"
    StoreCore(MEMORY, epoch=2, ssd=SSD).handle(found, 0)
    return len(found.keys)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_byte(tmp_path: Path, seed: int) -> None:
    life = Life(tmp_path, seed)
    for _ in range(120):
        life.step()
    life.core.check_integrity()
    metrics = life.core.metrics()
    assert metrics["ssd_evictions"] > 5 and metrics["ssd_reads"] > 5
    life.jobs.close()

    image = bytearray(SSD.geometry.capacity_bytes)
    most = 0
    for write in life.file.writes:
        before = bytes(image[write.offset : write.offset + len(write.data)])
        for cut in cuts(len(write.data)):
            image[write.offset : write.offset + len(write.data)] = write.data[:cut] + before[cut:]
            most = max(most, check(image, life.file.file_id, write.known))
    assert most > 15


def test_a_life_that_follows_finds_the_same(tmp_path: Path) -> None:
    known: set[bytes] = set()
    for seed in range(5):
        life = Life(tmp_path, seed)
        assert set(life.core._ssd.log.copies) >= known
        for _ in range(60):
            life.step()
        known = set(life.core._ssd.log.copies)
        life.jobs.close()
    assert len(known) > 10
