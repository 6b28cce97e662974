"""A node with an SSD tier on a real file: what comes back after a restart, and what a disk may do wrong."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
import xxhash

from mooncake.core.errors import StoreError
from mooncake.core.keys import block_keys_of
from mooncake.core.types import Tier
from mooncake.store.client import StoreClient
from mooncake.store.events import Report, Snapshot
from mooncake.store.node import NodeConfig, StoreNode
from mooncake.store.ssd import SsdConfig
from mooncake.store.ssd_file import HEADER_BYTES
from mooncake.store.types import CommitStatus, PutStatus
from tests.store.helpers import TOKEN, eventually, key, keys, node_config, run

MEMORY = 2 << 20
SIZE = 100_000
"""Of an object; 20 of them fit into memory."""
SSD = SsdConfig(64 << 20, extent_bytes=1 << 20, room_wait_ns=2_000_000_000)


def contents(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def config(folder: Path, **options: object) -> NodeConfig:
    return node_config(capacity_bytes=MEMORY, alignment=4096, ssd=SSD, ssd_dir=str(folder), **options)


@asynccontextmanager
async def serving(
    settings: NodeConfig,
) -> AsyncIterator[tuple[StoreNode, StoreClient, list[Report | Snapshot]]]:
    reports: list[Report | Snapshot] = []
    node = StoreNode(settings, reports.append)
    await node.start()
    try:
        client = await StoreClient.connect([node.addresses[0]], token=TOKEN, name="test", node=settings.node)
        try:
            yield node, client, reports
        finally:
            await client.close()
    finally:
        await node.close()
        node.core.check_integrity()


async def put(client: StoreClient, number: int, checksum: int | None = None) -> None:
    made = await client.reserve([key(number)], [SIZE])
    assert made.statuses == (PutStatus.RESERVED,)
    made.write(0, 0, contents(number))
    checksums = () if checksum is None else (checksum,)
    assert await client.commit(made, checksums=checksums) == {0: CommitStatus.COMMITTED}


async def read(client: StoreClient, number: int) -> bytes | None:
    leased = await client.lease([key(number)])
    if not leased.hits:
        return None
    found = bytes(leased.view(0))
    await client.release(leased)
    return found


async def until_written(node: StoreNode) -> None:
    await eventually(lambda: not node.core.metrics()["ssd_jobs"])


async def put_all(node: StoreNode, client: StoreClient, num_objects: int) -> None:
    """Objects 0 and up, and what they evict written to the SSD."""
    for number in range(num_objects):
        await put(client, number)
    await until_written(node)


def on_ssd(reports: Sequence[Report | Snapshot]) -> set[bytes]:
    found: set[bytes] = set()
    for report in reports:
        if report.tier is Tier.SSD:
            before = set() if isinstance(report, Snapshot) else found - set(report.removed)
            found = before | set(report.keys if isinstance(report, Snapshot) else report.added)
    return set(block_keys_of(tuple(found)))


def ssd_path(settings: NodeConfig) -> Path:
    return Path(settings.ssd_dir) / f"mooncake-{settings.cluster}-{settings.node}.ssd"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The kernel lets this process write no file from there on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------ as it should be


def test_what_does_not_fit_in_memory_comes_back_from_ssd_also_after_a_restart(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, reports):
            await put_all(node, client, 100)
            metrics = node.core.metrics()
            assert metrics["lost_evictions"] == 0 and metrics["ssd_objects"] >= 80
            for number in range(100):
                assert await read(client, number) == contents(number)
            await until_written(node)
            await eventually(lambda: on_ssd(reports) == set(block_keys_of(tuple(node.core._ssd.log.copies))))
            known = list(node.core._ssd.log.copies)
        async with serving(settings) as (node, client, reports):
            assert node.core.metrics()["ssd_recovered"] == len(known) >= 80
            node.snapshot()
            assert on_ssd(reports) == set(block_keys_of(tuple(known)))
            for number in range(100):
                assert await read(client, number) == (contents(number) if key(number) in known else None)
            assert node.core.metrics()["ssd_corrupt"] == node.core.metrics()["ssd_read_errors"] == 0

    run(main())


def test_a_checksum_of_the_client_goes_all_the_way(tmp_path: Path) -> None:
    """The number that a client gave is the one in the table, and the one that is compared after a restart."""
    settings = config(tmp_path)
    checksums = {number: xxhash.xxh3_64_intdigest(contents(number)) for number in range(40)}

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            for number in range(40):
                await put(client, number, checksums[number] if number % 2 else None)
            await until_written(node)
        async with serving(settings) as (node, client, _):
            copies = node.core._ssd.log.copies
            assert len(copies) > 20
            for number in range(40):
                if key(number) in copies:
                    assert copies[key(number)].checksum == checksums[number]

    run(main())


def test_what_was_removed_stays_away_after_a_restart(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        await fill(settings)
        async with serving(settings) as (node, client, _):
            assert await client.remove(keys(3, 5)) == (True, True)
            await put(client, 5)
            await until_written(node)
        async with serving(settings) as (node, client, _):
            assert await client.exists(keys(2, 3, 4, 5)) == (True, False, True, False)

    run(main())


# ------------------------------------------------------------ as it should not be


def test_contents_that_are_not_what_was_committed_are_not_written(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            await put(client, 0, checksum=77)
            for number in range(1, 19):
                await put(client, number)
            await until_written(node)
            metrics = node.core.metrics()
            assert metrics["ssd_corrupt"] == 1 and metrics["ssd_write_errors"] == 0
            assert await client.exists(keys(0, 1)) == (False, True)

    run(main())


@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1])
def test_a_corrupt_byte_on_ssd_is_found_dropped_counted_and_never_delivered(tmp_path: Path, at: int) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            await put_all(node, client, 40)
            copy = node.core._ssd.log.copies[key(3)]
            flip(ssd_path(settings), HEADER_BYTES + copy.offset + at)
            assert await read(client, 3) is None
            metrics = node.core.metrics()
            assert (metrics["ssd_corrupt"], metrics["ssd_read_errors"]) == (1, 0)
            assert await client.exists(keys(3)) == (False,)
            assert [await read(client, number) for number in (2, 4)] == [contents(2), contents(4)]
        flip(ssd_path(settings), HEADER_BYTES + copy.offset + at)

    run(main())


def test_a_corrupt_byte_behind_an_object_is_nobodys(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            await put_all(node, client, 40)
            flip(ssd_path(settings), HEADER_BYTES + node.core._ssd.log.copies[key(3)].offset + SIZE)
            assert await read(client, 3) == contents(3)

    run(main())


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def test_a_disk_that_takes_nothing_costs_what_is_evicted_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes fail, three jobs in a row, and then rest; the node serves from memory."""
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            with file_size_limit(HEADER_BYTES):
                await put_all(node, client, 60)
            metrics = node.core.metrics()
            assert metrics["ssd_rests"] == 1 and metrics["ssd_objects"] == 0
            assert metrics["ssd_write_errors"] > 0 and metrics["lost_evictions"] == metrics["evictions"] == 40
            for number in range(40, 60):
                assert await read(client, number) == contents(number)

    run(main())
    assert "writes to SSD failed in a row: none for 30 s" in caplog.text
    assert "File too large" in caplog.text


def test_half_a_disk_keeps_what_it_has(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            with file_size_limit(HEADER_BYTES + (2 << 20)):
                await put_all(node, client, 60)
            known = list(node.core._ssd.log.copies)
            assert node.core.metrics()["ssd_write_errors"] > 0 and 10 < len(known) < 20
        async with serving(settings) as (node, client, _):
            assert list(node.core._ssd.log.copies) == known
            for number in range(60):
                assert await read(client, number) == (contents(number) if key(number) in known else None)

    run(main())


def test_what_cannot_be_read_is_missed_and_dropped(tmp_path: Path) -> None:
    """Somebody cut the file short."""
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings) as (node, client, _):
            await put_all(node, client, 60)
            os.truncate(ssd_path(settings), HEADER_BYTES + (1 << 20))
            copies = dict(node.core._ssd.log.copies)
            gone = [number for number in range(40) if copies[key(number)].offset >= 1 << 20]
            left = [number for number in range(40) if number not in gone]
            assert gone and left
            for number in range(40):
                found = await read(client, number)
                assert found in (None, contents(number))
                assert (found is None) <= (number in gone)
            metrics = node.core.metrics()  # what was written since made the file long again, with a hole
            assert metrics["ssd_read_errors"] + metrics["ssd_corrupt"] == len(gone)

    run(main())


# ------------------------------------------------------------ starts that are refused


def start_error(settings: NodeConfig) -> str:
    async def main() -> str:
        with pytest.raises(StoreError) as caught:
            async with serving(settings):
                pass
        return str(caught.value)

    text: str = run(main())
    assert not list(Path("/dev/shm").glob(f"mooncake-{settings.cluster}-*"))
    return text


def test_a_disk_that_is_too_small_is_an_error_of_the_start(tmp_path: Path) -> None:
    huge = msgspec.structs.replace(config(tmp_path), ssd=SsdConfig(1 << 45))
    text = start_error(huge)
    assert "the disk is too small" in text and str((1 << 45) + HEADER_BYTES) in text and "lower the store's SSD" in text
    assert ssd_path(huge).stat().st_blocks == 0


def test_a_file_that_may_not_grow_is_an_error_of_the_start(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with file_size_limit(8 << 20):
        assert "File too large" in start_error(settings)


def test_a_folder_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in start_error(config(tmp_path / "file" / "below"))


def test_a_file_of_another_node_or_cluster_is_refused_by_name(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run(start_and_stop(settings))
    assert ssd_path(settings).stat().st_mode & 0o777 == 0o600
    other = msgspec.structs.replace(settings, node="n1")
    ssd_path(settings).rename(ssd_path(other))
    text = start_error(other)
    assert f"of node n0 in cluster {settings.cluster}, not of n1" in text and "remove it" in text


def test_a_file_that_is_none_of_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    settings = config(tmp_path)
    ssd_path(settings).write_bytes(b"my thesis" * 1000)
    assert "is no file of an SSD tier" in start_error(settings)
    assert ssd_path(settings).read_bytes() == b"my thesis" * 1000


def test_two_nodes_do_not_share_a_file(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        async with serving(settings):
            second = StoreNode(
                msgspec.structs.replace(settings, unix_path=settings.unix_path + "2", shm_dir=str(tmp_path)), print
            )
            with pytest.raises(StoreError, match="is owned by a live process"):
                await second.start()
        await start_and_stop(settings)

    run(main())


def test_an_alignment_that_direct_io_cannot_use_is_refused(tmp_path: Path) -> None:
    assert "multiple of 4096" in start_error(msgspec.structs.replace(config(tmp_path), alignment=64))


async def start_and_stop(settings: NodeConfig) -> None:
    async with serving(settings):
        pass


# ------------------------------------------------------------ other files of ours


def test_extents_of_another_size_begin_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        await fill(settings)
        other = msgspec.structs.replace(settings, ssd=msgspec.structs.replace(SSD, extent_bytes=2 << 20))
        async with serving(other) as (node, client, _):
            assert node.core.metrics()["ssd_recovered"] == 0
        async with serving(settings) as (node, client, _):  # nor does what was there before come back
            assert node.core.metrics()["ssd_recovered"] == 0

    run(main())
    assert "its contents are given up" in caplog.text


def test_another_capacity_keeps_what_it_has_room_for(tmp_path: Path) -> None:
    settings = config(tmp_path)

    async def main() -> None:
        await fill(settings)
        for capacity, least in ((32 << 20, 40), (4 << 20, 20)):
            other = msgspec.structs.replace(settings, ssd=msgspec.structs.replace(SSD, capacity_bytes=capacity))
            async with serving(other) as (node, client, _):
                assert ssd_path(settings).stat().st_size == HEADER_BYTES + capacity
                known = list(node.core._ssd.log.copies)
                assert len(known) >= least
                for number in range(60):
                    assert await read(client, number) == (contents(number) if key(number) in known else None)

    run(main())


async def fill(settings: NodeConfig) -> None:
    async with serving(settings) as (node, client, _):
        await put_all(node, client, 60)


def test_a_file_system_without_direct_io(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mooncake.store.ssd_file._go_direct", lambda fd: False)
    settings = config(tmp_path)

    async def main() -> None:
        await fill(settings)
        async with serving(settings) as (node, client, _):
            known = list(node.core._ssd.log.copies)
            assert len(known) >= 40
            for number in range(60):
                assert await read(client, number) == (contents(number) if key(number) in known else None)

    run(main())
    assert "no direct I/O on this file system" in caplog.text
