"""A node on real sockets: deaths, strangers, broken frames, reports, restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from mooncake.core.errors import (
    AuthError,
    BadArgument,
    DeadlineExceeded,
    HandleLost,
    PathLost,
    ProtocolError,
    StoreError,
    StoreUnavailable,
)
from mooncake.core.keys import KEY_BYTES, object_key
from mooncake.core.messages import CacheDelta, CacheSnapshot
from mooncake.store import wire
from mooncake.store.client import StoreClient
from mooncake.store.events import Lease, Report, Snapshot
from mooncake.store.handles import Link
from mooncake.store.node import StoreNode
from mooncake.store.service import to_message
from mooncake.store.types import CommitStatus, Places, PutMode, PutStatus
from mooncake.transport.base import Piece, Region
from mooncake.transport.frames import HEADER, PIECE, ErrorCode, FrameReader, Kind
from mooncake.transport.tcp import TcpPath, parse_address
from tests.store.helpers import TOKEN, eventually, keys, node_config, run, running_node

WRITER = """
import asyncio, sys
from mooncake.store.client import StoreClient
async def main():
    client = await StoreClient.connect([sys.argv[1]], token=sys.argv[2], name="writer")
    held = await client.reserve([int(1).to_bytes(24, "big"), int(2).to_bytes(24, "big")], [100_000, 100_000])
    held.write(0, 0, b"half")
    await client.commit(held, [1], lease=True)
    print("reserved", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def start_writer(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


async def connect(node: StoreNode, at: int = 0, **options: str) -> StoreClient:
    return await StoreClient.connect([node.addresses[at]], **({"token": TOKEN, "name": "test"} | options))


@pytest.mark.parametrize("at", [0, 1], ids=["unix", "tcp"])
def test_a_killed_writer_frees_its_key_at_once(at: int) -> None:
    async def main() -> None:
        async with running_node() as node:
            client = await connect(node)
            arguments = [sys.executable, "-c", WRITER, node.addresses[at], TOKEN]
            with start_writer(arguments) as writer:
                assert writer.stdout is not None
                assert await asyncio.to_thread(writer.stdout.readline) == b"reserved\n"
                strict = {"mode": PutMode.STRICT, "checksums": [5]}
                assert (await client.reserve(keys(1), [10], **strict)).statuses == (PutStatus.BUSY,)
                writer.send_signal(signal.SIGKILL)
                writer.wait()
            await eventually(lambda: node.metrics()["clients"] == 1, within_s=0.5)
            assert node.metrics()["leases"] == node.metrics()["reservations"] == 0
            assert (await client.reserve(keys(1), [10], **strict)).statuses == (PutStatus.RESERVED,)
            assert await client.exists(keys(2)) == (True,)
            await client.close()

    run(main())


def test_a_wrong_token_is_refused() -> None:
    async def main() -> None:
        async with running_node() as node:
            for at in (0, 1):
                with pytest.raises(AuthError, match="token"):
                    await connect(node, at, token="guess")
            greeting = wire.encode_hello(wire.Hello(wire.VERSION, TOKEN, "x", "", b"no such session!"))
            path = TcpPath(Region("tcp", node.addresses[1], 1 << 20), greeting)
            with pytest.raises(PathLost, match="session"):
                await asyncio.to_thread(path.read, [Piece(0, memoryview(bytearray(1)), 1)])
            assert node.metrics()["auth_errors"] == 3 and node.metrics()["clients"] == 0

    run(main())


def raw_exchange(address: str, *sent: bytes) -> list[tuple[int, int, bytes]]:
    """Send, and read frames until the node closes."""
    family, target = parse_address(address)
    with socket.socket(family) as stream:
        stream.settimeout(5)
        stream.connect(target)
        for data in sent:
            stream.sendall(data)
        received = b""
        while chunk := stream.recv(65536):
            received += chunk
    frames = []
    while received:
        kind, _, count, _, length = HEADER.unpack_from(received)
        frames.append((kind, count, received[HEADER.size : HEADER.size + length]))
        received = received[HEADER.size + length :]
    return frames


def test_who_leases_hears_how_much_came_from_ssd_unless_it_is_too_old_to_understand_it() -> None:
    event = Lease(1, 5, keys(1, 2))
    for checksums in ((), (7, None)):
        places = Places((0, 64), (64, 64), (3, 4), checksums, num_loaded=1)
        told, untold = [
            wire.decode_reply(event, FrameReader(1 << 10).feed(wire.encode_reply(5, places, minor))[0])
            for minor in (wire.TELLS_LOADED, wire.TELLS_LOADED - 1)
        ]
        assert (told, untold) == (places, msgspec.structs.replace(places, num_loaded=0))


HELLO = wire.encode_hello(wire.Hello(wire.VERSION, TOKEN, "raw", ""))


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ([HEADER.pack(wire.Op.HELLO, 0, 0, 0, 1 << 40)], b"limit"),
        ([HEADER.pack(wire.Op.HELLO, 0, 0, 0, 3), b"abc"], b"bad Hello"),
        ([HEADER.pack(wire.Op.EXISTS, 0, 0, 0, 0)], b"first frame"),
        ([wire.encode_hello(wire.Hello(99, TOKEN, "old", ""))], b"version 99"),
        ([HELLO, HEADER.pack(wire.Op.EXISTS, 0, 1, 0, 1 << 33)], b"limit"),
        ([HELLO, HEADER.pack(wire.Op.EXISTS, 0, 2, 0, 24) + bytes(24)], b"need 48 bytes"),
        ([HELLO, HEADER.pack(99, 0, 0, 0, 0)], b"not a request"),
    ],
)
@pytest.mark.parametrize("at", [0, 1], ids=["unix", "tcp"])
def test_a_broken_frame_ends_the_connection_with_a_reason(at: int, sent: list[bytes], why: bytes) -> None:
    async def main() -> None:
        async with running_node() as node:
            *_, (kind, code, detail) = await asyncio.to_thread(raw_exchange, node.addresses[at], *sent)
            assert kind == Kind.ERROR and code == ErrorCode.PROTOCOL and why in detail
            await eventually(lambda: node.metrics()["clients"] == 0)
            assert node.metrics()["protocol_errors"] == 1

    run(main())


def test_ranges_are_served_to_their_claimant_only() -> None:
    async def main() -> None:
        async with running_node() as node:
            owner, other = await connect(node, 1), await connect(node, 1)
            mine = await owner.reserve(keys(1), [1000])
            [number], location = mine.numbers([0]), mine.locations[0]
            assert location is not None
            await asyncio.to_thread(mine.write, 0, 0, bytes(1000))
            foreign = (await other.reserve(keys(2), [1000])).link.path
            for claim, offset in ((number, location.offset), (number, location.offset + 1), (99, 0)):
                piece = Piece(offset, memoryview(bytearray(1000)), claim)
                with pytest.raises(StoreError), Link(foreign).call() as path:
                    await asyncio.to_thread(path.read, [piece])
                with pytest.raises(StoreError), Link(foreign).call() as path:
                    await asyncio.to_thread(path.write, [piece])
            assert await owner.commit(mine) == {0: CommitStatus.COMMITTED}
            assert node.metrics()["bytes_written"] == 1000 and node.metrics()["bytes_read"] == 0
            await owner.close()
            await other.close()

    run(main())


def test_a_claim_given_up_under_a_transfer_ends_the_connection_and_then_the_claim() -> None:
    async def main() -> None:
        async with running_node() as node:
            client = await connect(node, 1)
            held = await client.reserve(keys(1), [100_000])
            location = held.locations[0]
            assert location is not None
            node_side = next(iter(node.connections))
            greeting = wire.encode_hello(wire.Hello(wire.VERSION, TOKEN, "test", "", node_side.session))
            family, target = parse_address(node.addresses[1])
            with socket.socket(family) as stream:
                stream.connect(target)
                stream.sendall(greeting)
                table = PIECE.pack(location.generation, location.offset, location.size)
                await eventually(lambda: len(node_side.data) == 1)
                stream.sendall(HEADER.pack(Kind.WRITE, 0, 1, 0, len(table) + location.size) + table + bytes(50_000))
                await eventually(lambda: node_side.data[0].uses([location.generation]))
                with pytest.raises(StoreUnavailable, match="a transfer under way relies on one of these claims"):
                    await client.cancel(held)
                await eventually(lambda: not node_side.data)
            await eventually(lambda: node.metrics()["reservations"] == 0)
            await client.close()

    run(main())


def test_reports_and_snapshots_tell_the_directory_everything() -> None:
    async def main() -> None:
        reports: list[Report | Snapshot] = []
        async with running_node(reports) as node:
            client = await connect(node)
            one, two = bytes([1] * KEY_BYTES), bytes([2] * KEY_BYTES)
            objects = [object_key(block, b"shard-0.") for block in (one, two)]
            await client.commit(await client.reserve(objects, [64, 64]))
            await eventually(lambda: len(reports) == 1)
            await client.remove(objects[:1])
            node.snapshot()
            assert [to_message("n0", report) for report in reports] == [
                CacheDelta("n0", node.epoch, 1, "dram", (one, two), ()),
                CacheDelta("n0", node.epoch, 2, "dram", (), (one,)),
                CacheSnapshot("n0", node.epoch, 2, "dram", (two,)),
            ]
            assert node.info.addresses == node.addresses and node.info.capacity_bytes == 1 << 20
            await client.close()

    run(main())


def test_a_restarted_node_is_found_again_and_old_claims_are_lost() -> None:
    async def main() -> None:
        config = node_config(tcp_port=None)
        node = StoreNode(config, lambda report: None)
        await node.start()
        client = await StoreClient.connect(node.addresses, token=TOKEN, name="test", node="n0")
        held = await client.reserve(keys(1), [64])
        await client.commit(held, lease=True)
        view = held.view(0)
        await node.close()
        await eventually(lambda: not client.connected)
        with pytest.raises(StoreUnavailable, match="not connected"):
            await client.exists(keys(1))
        with pytest.raises(HandleLost, match="connection"):
            held.read(0, 0, bytearray(1))
        assert len(view) == 64  # the old pages stay as long as somebody looks at them
        again = StoreNode(config, lambda report: None)
        await again.start()
        await eventually(lambda: client.connected)
        assert await client.exists(keys(1)) == (False,)
        with pytest.raises(HandleLost):
            held.read(0, 0, bytearray(1))
        await client.release(held)  # nothing is left to release, and that is no error
        await client.close()
        await again.close()

    run(main())


def test_addresses_are_tried_cheapest_first_and_all_named_in_failure() -> None:
    async def main() -> None:
        async with running_node() as node:
            addresses = [node.addresses[1], "unix:/nowhere/x.sock"]
            client = await StoreClient.connect(addresses, token=TOKEN, name="test")
            held = await client.reserve(keys(1), [64])
            assert not held.mapped
            await client.close()
            client = await StoreClient.connect(node.addresses[::-1], token=TOKEN, name="test")
            assert (await client.reserve(keys(1), [64])).mapped
            await client.close()
            with pytest.raises(StoreUnavailable, match="is node n0, not n7"):
                await StoreClient.connect(node.addresses, token=TOKEN, name="test", node="n7")
        with pytest.raises(StoreUnavailable, match=r"x\.sock.*tcp://127"):
            await StoreClient.connect(addresses, token=TOKEN, name="test")
        with pytest.raises(BadArgument, match="address"):
            parse_address("http://x:1")

    run(main())


def test_a_stopped_node_meets_deadlines_and_what_it_did_late_is_undone() -> None:
    async def main() -> None:
        async with running_node() as node:
            client = await connect(node)
            await client.commit(await client.reserve(keys(1), [64]))
            handle, node.handle = node.handle, lambda event: asyncio.get_running_loop().call_later(0.1, handle, event)  # type: ignore[method-assign]
            for call in (client.lease(keys(1, 9)), client.reserve(keys(1, 2), [64, 64], lease_existing=True)):
                with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.02"):
                    async with asyncio.timeout(5):
                        await _with_deadline(client, call)
            node.handle = handle  # type: ignore[method-assign]
            await asyncio.sleep(0.15)
            await eventually(lambda: node.metrics()["leases"] == node.metrics()["reservations"] == 0)
            assert node.metrics()["hits"] == 1
            await client.close()

    async def _with_deadline(client: StoreClient, call: object) -> None:
        inner, client._call = client._call, lambda request, deadline_s: inner(request, 0.02)  # type: ignore[method-assign]
        try:
            await call  # type: ignore[misc]
        finally:
            client._call = inner  # type: ignore[method-assign]

    run(main())


def test_a_node_that_cannot_start_says_why_and_leaves_nothing() -> None:
    async def main() -> None:
        with pytest.raises(StoreError, match="too small"):
            await StoreNode(node_config(capacity_bytes=1 << 50), print).start()
        with pytest.raises(BadArgument, match="unix_path"):
            await StoreNode(node_config(unix_path="/tmp/" + "x" * 200), print).start()
        async with running_node() as node:
            with pytest.raises(StoreError, match="live process"):
                await StoreNode(node_config(cluster=node.config.cluster), print).start()
            port = int(node.addresses[1].rpartition(":")[2])
            config = node_config(tcp_port=port)
            with pytest.raises(StoreError, match=f":{port}"):
                await StoreNode(config, print).start()
            assert not os.path.exists(f"/dev/shm/mooncake-{config.cluster}-n0")
            assert not os.path.exists(config.unix_path)
        assert not os.path.exists(f"/dev/shm/mooncake-{node.config.cluster}-n0")
        assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"mooncake-t{os.getpid()}-")]

    run(main())


def test_the_socket_and_the_segment_are_for_their_owner_only() -> None:
    async def main() -> None:
        async with running_node() as node:
            assert node.segment is not None
            assert os.stat(node.segment.path).st_mode & 0o777 == os.stat(node.config.unix_path).st_mode & 0o777 == 0o600

    run(main())


def test_a_protocol_error_on_a_mapped_connection_waits_for_the_client_to_let_go() -> None:
    async def main() -> None:
        async with running_node() as node:
            client = await connect(node)
            held = await client.reserve(keys(1), [64])
            with held.link.call():  # a copy is running
                node_side = next(iter(node.connections))
                node_side._fail(ProtocolError("on purpose"))
                await eventually(lambda: not client.connected)
                await asyncio.sleep(0.02)
                assert node.metrics()["reservations"] == 1
            await eventually(lambda: node.metrics()["reservations"] == 0)
            await eventually(lambda: client.connected)
            await client.close()

    run(main())
