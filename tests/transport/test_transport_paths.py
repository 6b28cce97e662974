"""The one-sided protocol: the same tests for every path, and shared-memory segments' own life."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path as FilePath

import pytest

from mooncake.core.errors import OutOfRange, PathLost, SegmentError, TransferTimeout
from mooncake.transport.base import Path, Piece, Region
from mooncake.transport.frames import MAX_PIECES, pack
from mooncake.transport.memory import MemoryTransport
from mooncake.transport.ranges import RangeServer
from mooncake.transport.shm import ShmSegment, cleanup_stale, open_segment, segment_path
from mooncake.transport.tcp import TcpPath

SIZE = 3 << 20


@contextlib.contextmanager
def range_server(buffer: memoryview, limit: int | None = None) -> Iterator[str]:
    """RangeServers behind one listening socket; claims equal to 13 are nobody's. limit: greet nobody."""

    def allows(claim: int, offset: int, size: int, write: bool) -> bool:
        return claim != 13 and offset + size <= buffer.nbytes

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = door.accept()
                streams.append(stream)
                if limit is None:
                    stream.recv(4096)  # the greeting
                    RangeServer(stream, buffer, allows, lambda server: None).start()

    streams: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{door.getsockname()[1]}"
        finally:
            door.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for stream in streams:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
                if limit is not None:
                    stream.close()


@pytest.fixture(params=["memory", "shm", "tcp"])
def path(request: pytest.FixtureRequest, tmp_path: FilePath) -> Iterator[Path]:
    if request.param == "memory":
        transport = MemoryTransport()
        registration = transport.register(bytearray(SIZE))
        yield transport.open(registration.region)
        registration.close()
        with pytest.raises(PathLost):
            transport.open(registration.region)
    elif request.param == "shm":
        segment = ShmSegment.create("c", "n", 1, SIZE, str(tmp_path))
        yield open_segment(segment.region, 1)
        segment.close()
    else:
        with range_server(memoryview(bytearray(SIZE))) as address:
            tcp = TcpPath(Region("tcp", address, SIZE), pack(1))
            yield tcp
            tcp.close()


def test_pieces_of_any_size_come_back_as_they_were(path: Path) -> None:
    parts = [(0, 1), (1, 64), (4096, 16383), (100_000, 16384), (1 << 20, 2 << 20)]
    sent = [memoryview(os.urandom(size)) for _, size in parts]
    path.write([Piece(at, data) for (at, _), data in zip(parts, sent, strict=True)]).wait()
    out = [memoryview(bytearray(size)) for _, size in parts]
    path.read([Piece(at, data) for (at, _), data in zip(parts, out, strict=True)]).wait()
    assert out == sent


def test_more_pieces_than_one_frame_holds(path: Path) -> None:
    num = MAX_PIECES + 5
    data = os.urandom(num * 8)
    path.write([Piece(at * 16, memoryview(data)[at * 8 : at * 8 + 8]) for at in range(num)]).wait()
    out = bytearray(num * 16)
    path.read([Piece(0, memoryview(out))]).wait()
    assert b"".join(out[at * 16 : at * 16 + 8] for at in range(num)) == data


def test_a_range_outside_is_refused_and_the_path_stays_usable(path: Path) -> None:
    buffer = memoryview(bytearray(8))
    with pytest.raises(OutOfRange):
        path.read([Piece(SIZE - 4, buffer)]).wait()
    with pytest.raises((OutOfRange, PathLost)):
        path.write([Piece(SIZE - 4, buffer)]).wait()
    path.read([Piece(SIZE - 8, buffer)]).wait()


def test_a_view_is_the_region_itself_both_ways(path: Path) -> None:
    view = path.view(10, 3)
    if view is None:
        assert isinstance(path, TcpPath)
        return
    path.write([Piece(10, memoryview(b"abc"))]).wait()
    assert view == b"abc"
    view[:] = b"xyz"
    out = memoryview(bytearray(3))
    path.read([Piece(10, out)]).wait()
    assert out == b"xyz"
    with pytest.raises(OutOfRange):
        path.view(SIZE - 2, 3)


def test_threads_share_a_path(path: Path) -> None:
    size, failures = 100_000, []

    def work(at: int) -> None:
        data = memoryview(os.urandom(size))
        out = memoryview(bytearray(size))
        for _ in range(5):
            path.write([Piece(at * size, data)]).wait()
            path.read([Piece(at * size, out)]).wait()
            if out != data:
                failures.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not failures


def test_a_claim_is_checked_by_the_serving_side() -> None:
    with range_server(memoryview(bytearray(SIZE))) as address:
        path = TcpPath(Region("tcp", address, SIZE), pack(1))
        with pytest.raises(OutOfRange, match="no claim 13"):
            path.read([Piece(0, memoryview(bytearray(8)), 13)])
        with pytest.raises((OutOfRange, PathLost)):
            path.write([Piece(0, memoryview(bytearray(8)), 13)])
        path.close()


def test_a_silent_peer_is_a_timeout_and_a_dead_one_a_loss() -> None:
    with range_server(memoryview(bytearray(64)), limit=0) as address:
        path = TcpPath(Region("tcp", address, 64), pack(1), timeout_s=0.1)
        with pytest.raises((TransferTimeout, PathLost)):
            path.read([Piece(0, memoryview(bytearray(8)))])
    with pytest.raises(PathLost, match="refused"):
        path.read([Piece(0, memoryview(bytearray(8)))])


OWNER = """
import sys, time
from mooncake.transport.shm import ShmSegment
segment = ShmSegment.create("c", "n", 5, 8192, sys.argv[1])
print("ready", flush=True)
time.sleep(60)
"""


def test_a_dead_owners_segment_is_stale_a_live_ones_is_not(tmp_path: FilePath) -> None:
    directory = str(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, directory], stdout=subprocess.PIPE, cwd=FilePath(__file__).parents[2]
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        region = Region("shm", segment_path("c", "n", directory), 8192)
        old = open_segment(region, 5)
        with pytest.raises(SegmentError, match="live process"):
            ShmSegment.create("c", "n", 6, 8192, directory)
        assert cleanup_stale("c", directory) == []
        owner.send_signal(signal.SIGKILL)
    new = ShmSegment.create("c", "n", 6, 8192, directory)
    old.write([Piece(0, memoryview(b"late"))]).wait()
    assert new.buffer[:4] == bytes(4)
    with pytest.raises(SegmentError, match="epoch 5"):
        open_segment(region, 5)
    new.close()
    assert os.listdir(directory) == []


def test_cleanup_takes_the_named_clusters_leftovers_only(tmp_path: FilePath) -> None:
    directory = str(tmp_path)
    for cluster, node in (("a", "1"), ("a-b", "1")):
        segment = ShmSegment.create(cluster, node, 1, 4096, directory)
        os.link(segment.path, segment.path + ".kept")
        segment.close()
        os.rename(segment.path + ".kept", segment.path)
    live = ShmSegment.create("a", "2", 1, 4096, directory)
    (tmp_path / "mooncake-a-3").touch()
    assert cleanup_stale("a", directory) == [f"{directory}/mooncake-a-1", f"{directory}/mooncake-a-3"]
    live.close()
    assert os.listdir(directory) == ["mooncake-a-b-1"]


def test_segments_that_cannot_be_made_say_why(tmp_path: FilePath) -> None:
    with pytest.raises(SegmentError, match="too small: the segment needs"):
        ShmSegment.create("c", "n", 1, 1 << 60, str(tmp_path))
    with pytest.raises(SegmentError, match="cluster must be"):
        ShmSegment.create("c/../x", "n", 1, 4096, str(tmp_path))
    with pytest.raises(SegmentError, match="cannot create"):
        ShmSegment.create("c", "n", 1, 4096, str(tmp_path / "missing"))
    with pytest.raises(SegmentError, match="cannot open"):
        open_segment(Region("shm", str(tmp_path / "x"), 4096), 1)
    assert os.listdir(tmp_path) == []
