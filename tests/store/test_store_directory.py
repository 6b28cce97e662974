"""The directory: what it decides, in steps; and a cluster of nodes and clients around it, on real sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mooncake.core.errors import AuthError, BadArgument, StoreUnavailable
from mooncake.core.messages import NodeInfo
from mooncake.core.types import NANOS_PER_S, Tier
from mooncake.store.api import Absent, PutResult, Replica, Store, named_key
from mooncake.store.copier import Copier
from mooncake.store.directory.core import (
    Changed,
    Copy,
    DirectoryConfig,
    DirectoryCore,
    DirectoryEvent,
    Find,
    Found,
    Gone,
    Registered,
    Snapshot,
    Tick,
    Told,
    Want,
)
from mooncake.store.directory.holders import Holder, Holders
from mooncake.store.directory.reporter import DirectoryReporter
from mooncake.store.directory.service import DirectoryServer
from mooncake.store.node import StoreNode
from tests.store.helpers import TOKEN, eventually, key, keys, node_config, run

DRAM, SSD = Tier.DRAM, Tier.SSD
S = NANOS_PER_S

# ---------------------------------------------------------------- holders


def test_holders_are_right_after_any_changes_and_dead_ones_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooncake.store.directory.holders.SWEEP_KEYS", 7)
    rng, holders = random.Random(3), Holders()
    expected: dict[bytes, set[Holder]] = {}
    live = list(range(4))
    for turn in range(3000):
        node, tier = rng.choice(live), rng.choice((DRAM, SSD))
        some = [key(rng.randrange(60)) for _ in range(4)]
        if rng.random() < 0.6:
            holders.add(Holder(node, tier), some)
            for each in some:
                expected.setdefault(each, set()).add(Holder(node, tier))
        else:
            holders.remove(Holder(node, tier), some)
            for each in some:
                expected.get(each, set()).discard(Holder(node, tier))
        if turn % 500 == 499:
            dead, live = live[0], [*live[1:], turn]
            holders.bury(dead)
            for members in expected.values():
                members -= {each for each in members if each.node == dead}
        if holders.sweeping:
            holders.sweep()
        numbers = holders.find([key(number) for number in range(60)])
        for number, found in enumerate(numbers):
            assert set(holders.sets[found]) == expected.get(key(number), set())
        assert all(tiers == sorted(tiers) for tiers in ([each.tier for each in members] for members in holders.sets))
    while holders.sweeping:
        holders.sweep()
    holders.check_integrity()
    assert len(holders) == sum(bool(members) for members in expected.values())
    one = Holder(live[0], DRAM)
    assert set(holders.of(one)) == {each for each, members in expected.items() if one in members}
    assert list(holders.of(Holder(99_999, DRAM))) == []


# ---------------------------------------------------------------- the core


class Driver:
    def __init__(self) -> None:
        self.now = 0
        self.core = DirectoryCore(DirectoryConfig(settle_ns=S, retry_ns=S, step_ns=S // 100), 0)

    def __call__(self, event: DirectoryEvent) -> list[object]:
        commands = self.core.handle(event, self.now)
        self.core.check_integrity()
        return list(commands)

    def node(self, peer: int, name: str, *there: int, settled: bool = True) -> None:
        assert self(Registered(peer, info(name))) == [Snapshot(peer)]
        if settled:
            self(Told(peer, DRAM, 0, keys(*there), True, True))
            self(Told(peer, SSD, 0, (), True, True))

    def find(self, *numbers: int) -> tuple[list[list[str]], bool]:
        [found] = self(Find(100, 1, keys(*numbers)))
        assert isinstance(found, Found)
        return names(found), found.unknown

    def wait(self, duration: int) -> list[object]:
        """Ticks as they are wanted, and what comes of them."""
        until, commands = self.now + duration, []
        while (deadline := self.core.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            commands += self(Tick())
        self.now = until
        return commands


def info(name: str) -> NodeInfo:
    return NodeInfo(name, 1, (f"tcp://{name}:1",), 1 << 20)


def names(found: Found) -> list[list[str]]:
    return [[found.nodes[each.node].name for each in found.sets.get(number, ())] for number in found.numbers]


def test_what_nodes_tell_is_found_and_what_they_lose_is_not() -> None:
    drive = Driver()
    drive.node(1, "a", 1, 2)
    drive.node(2, "b", 2)
    assert drive.find(1, 2, 3) == ([["a"], ["a", "b"], []], True), "somebody may still come"
    drive.wait(2 * S)
    assert drive.find(1, 2, 3) == ([["a"], ["a", "b"], []], False)
    drive(Changed(1, DRAM, 1, keys(3), keys(1)))
    drive(Changed(1, SSD, 1, keys(1), ()))
    assert drive.find(1, 2, 3) == ([["a"], ["a", "b"], ["a"]], False)
    drive(Changed(1, DRAM, 1, keys(9), ()))
    assert drive.find(9) == ([[]], False), "said twice"
    drive(Gone(1))
    assert drive.find(1, 2, 3) == ([[], ["b"], []], False)
    drive.wait(S)
    assert drive.core.metrics()["objects"] == 1


def test_a_gap_is_repaired_by_a_snapshot_and_until_then_it_is_unknown() -> None:
    drive = Driver()
    drive.node(1, "a", 1, 2)
    drive.wait(2 * S)
    assert drive(Changed(1, DRAM, 3, keys(5), keys(1))) == [Snapshot(1)]
    assert drive.find(1, 7) == ([["a"], []], True)
    assert drive(Changed(1, DRAM, 4, keys(6), ())) == [], "it is in the snapshot that comes"
    drive(Told(1, DRAM, 4, keys(2), True, False))
    assert drive.find(6)[1]
    drive(Told(1, DRAM, 4, keys(5, 6), False, True))
    assert drive.find(1, 2, 5, 6, 7) == ([[], ["a"], ["a"], ["a"], []], False)
    drive(Changed(1, DRAM, 5, keys(8), ()))
    assert drive.find(8) == ([["a"]], False)


def test_a_node_that_never_tells_is_waited_for_a_bounded_time() -> None:
    drive = Driver()
    drive.wait(2 * S)
    drive.node(1, "a", settled=False)
    assert drive.find(1) == ([[]], True)
    drive.wait(S)
    assert drive.find(1) == ([[]], False)


def test_a_new_life_of_a_node_takes_the_place_of_the_old() -> None:
    drive = Driver()
    drive.node(1, "a", 1)
    drive.node(2, "a", 2)
    assert drive.find(1, 2)[0] == [[], ["a"]]
    drive(Gone(1))
    drive(Changed(1, DRAM, 1, keys(3), ()))
    assert drive.find(2, 3)[0] == [["a"], []]


def test_missing_replicas_are_copied_and_again_when_a_node_is_lost() -> None:
    drive = Driver()
    drive.node(1, "a", 1, 2, 3)
    drive.node(2, "b")
    drive.node(3, "c")
    drive.wait(2 * S)
    asked = [each for each in drive(Want(100, 1, keys(1, 2, 3, 4), 2)) if isinstance(each, Copy)]
    assert sorted(k for each in asked for k in each.keys) == list(keys(1, 2, 3))
    assert {each.source.name for each in asked} == {"a"} and {each.peer for each in asked} <= {2, 3}
    for each in asked:
        drive(Changed(each.peer, DRAM, 1, each.keys, ()))
    assert drive.wait(5 * S) == [] and drive.core.metrics()["short"] == 0
    assert drive.core.metrics()["wanted"] == 3, "what nobody has cannot be wanted"
    lost = asked[0]
    drive(Gone(lost.peer))
    again = [each for each in drive.wait(S // 2) if isinstance(each, Copy)]
    assert sorted(k for each in again for k in each.keys) == sorted(lost.keys)
    assert {each.peer for each in again} == {2, 3} - {lost.peer} and again[0].source.name == "a"
    assert [each for each in drive.wait(3 * S) if isinstance(each, Copy)], "it did not come: asked again"
    drive(Want(100, 2, keys(1, 2, 3), 1))
    assert drive.wait(5 * S) == []


# ---------------------------------------------------------------- a cluster


class Cluster:
    def __init__(self, server: DirectoryServer) -> None:
        self.server = server
        self.nodes: dict[str, StoreNode] = {}
        self._copiers: dict[str, Copier] = {}
        self._reporters: dict[str, DirectoryReporter] = {}

    async def start(self, name: str, **options: object) -> StoreNode:
        node = StoreNode(node_config(cluster=self.server.cluster, node=name, **options), self._report(name))
        await node.start()
        copier = self._copiers[name] = Copier(node)
        reporter = DirectoryReporter(node, self.server.addresses, copier.wish_objects)
        node.directory = self._reporters[name] = reporter
        self.nodes[name] = node
        return node

    def _report(self, name: str):  # type: ignore[no-untyped-def]
        return lambda command: self._reporters[name].report(command) if name in self._reporters else None

    async def stop(self, name: str) -> None:
        await self._reporters.pop(name).close()
        await self._copiers.pop(name).close()
        await self.nodes.pop(name).close()

    async def known(self, count: int) -> None:
        await eventually(lambda: len(self.server.core.nodes) == count)

    def client(self, home: str, at: int = 0) -> Store:
        return Store.connect(
            [self.nodes[home].addresses[at]], directory=self.server.addresses, cluster=self.server.cluster, token=TOKEN
        )


@asynccontextmanager
async def cluster(*names: str, settle_ns: int = 0) -> AsyncIterator[Cluster]:
    config = DirectoryConfig(settle_ns=settle_ns, retry_ns=S // 5)
    server = DirectoryServer(node_config().cluster, TOKEN, ["tcp://127.0.0.1:0"], config)
    await server.start()
    made = Cluster(server)
    try:
        for name in names:
            await made.start(name)
        await made.known(len(names))
        yield made
        made.server.core.check_integrity()
    finally:
        for name in list(made.nodes):
            await made.stop(name)
        await made.server.close()


def test_an_object_of_another_node_is_found_read_and_checked() -> None:
    async def main() -> None:
        async with cluster("a", "b") as nodes:
            a = await asyncio.to_thread(nodes.client, "a")
            b = await asyncio.to_thread(nodes.client, "b", 1)
            ask = asyncio.to_thread
            assert await ask(a.put, key(1), b"1" * 100_000) is PutResult.STORED
            assert await ask(b.get, key(1)) == b"1" * 100_000
            assert await ask(b.exists, key(1)) and not await ask(b.exists, key(2))
            assert await ask(b.locate, keys(1, 2)) == [[Replica("a", DRAM)], []]
            assert (
                await ask(b.get_into, key(1), out := bytearray(100_001)) == 100_000 and out[:100_000] == b"1" * 100_000
            )
            with pytest.raises(BadArgument, match=r"buffers\[0\]: 5 bytes for an object of 100000"):
                await ask(b.get_into, key(1), bytearray(5))
            assert await ask(b.get_batch, keys(1, 2)) == [b"1" * 100_000, Absent.MISS]
            node = nodes.nodes["a"]
            assert node.segment is not None
            remote = await ask(lambda: Store.connect(node.addresses[1:], token=TOKEN))
            for number, store in ((1, a), (2, b), (3, remote)):
                await ask(a.put, key(number), b"1" * 100_000)
                [found] = node.core._objects.find(keys(number))
                assert found is not None
                node.segment.buffer[node.core._objects.offsets[found] + 50] ^= 1
                assert await ask(store.get, key(number)) is Absent.MISS, "a damaged object is never given out"
                assert node.core.metrics()["damaged"] == number and not await ask(a.exists, key(number))
            for store in (a, b, remote):
                await ask(store.close)

    run(main())


def test_replicas_survive_their_nodes_and_are_made_again() -> None:
    async def main() -> None:
        async with cluster("a", "b", "c") as nodes:
            ask = asyncio.to_thread
            a = await ask(nodes.client, "a")
            c = await ask(nodes.client, "c", 1)
            names, data = keys(*range(40)), [bytes([number]) * 5000 for number in range(40)]
            assert set(await ask(a.put_batch, names, data, replicas=2)) == {PutResult.STORED}
            assert await ask(a.replicate, names, 2) == [2] * 40
            await ask(a.close)
            await nodes.stop("a")
            assert await ask(c.get_batch, names) == data
            assert await ask(c.replicate, names, 2) == [2] * 40
            assert await ask(c.remove_batch, names) == [True] * 40
            assert await ask(c.get_batch, names) == [Absent.MISS] * 40
            await ask(c.close)

    run(main())


def test_a_directory_that_starts_anew_hears_everything_again_and_says_unknown_until_then() -> None:
    async def main() -> None:
        async with cluster("a", "b", settle_ns=S // 2) as nodes:
            ask = asyncio.to_thread
            a, b = await ask(nodes.client, "a"), await ask(nodes.client, "b", 1)
            names = keys(*range(2000))
            await ask(a.put_batch, names, [bytes(64)] * 2000)
            old = nodes.server
            await old.close()
            with pytest.raises(StoreUnavailable, match="directory"):
                await ask(b.get, key(1))
            assert await ask(a.get, key(1)) == bytes(64), "what is at home needs no directory"
            server = DirectoryServer(old.cluster, TOKEN, old.addresses, DirectoryConfig(settle_ns=S // 2))
            await server.start()
            nodes.server = server
            assert await ask(b.get, key(5000)) is Absent.UNKNOWN
            await nodes.known(2)
            await eventually(lambda: server.core.metrics()["objects"] == 2000)
            assert await ask(b.get, key(1)) == bytes(64)
            await asyncio.sleep(0.6)
            assert await ask(b.get, key(5000)) is Absent.MISS
            for store in (a, b):
                await ask(store.close)

    run(main())


def test_strangers_and_broken_frames_are_refused() -> None:
    async def main() -> None:
        async with cluster("a") as nodes:
            server = nodes.server
            for cluster_name, token, match in ((server.cluster, "x", "token"), ("other", TOKEN, "not of 'other'")):
                with pytest.raises(AuthError, match=match):
                    await asyncio.to_thread(
                        lambda cluster_name=cluster_name, token=token: Store.connect(
                            directory=server.addresses, cluster=cluster_name, token=token
                        )
                    )
            host, port = server.addresses[0].removeprefix("tcp://").split(":")
            for data in (b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(16), b"\xff" * 64):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(data)
                assert await reader.read()  # why, and the end
                writer.close()
            assert len(server.core.nodes) == 1

    run(main())


def test_a_client_without_a_node_of_its_own_takes_the_directorys() -> None:
    async def main() -> None:
        async with cluster("a") as nodes:
            found = await asyncio.to_thread(
                lambda: Store.connect(directory=nodes.server.addresses, cluster=nodes.server.cluster, token=TOKEN)
            )
            assert await asyncio.to_thread(found.put, named_key("x"), b"y") is PutResult.STORED
            assert nodes.nodes["a"].core.metrics()["objects"] == 1
            await asyncio.to_thread(found.close)
        with pytest.raises(BadArgument, match="addresses"):
            Store.connect(token=TOKEN)

    run(main())
