"""The shell of prefill and decode: commands become calls, and whatever the store does, the core gets an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from mooncake.core.errors import StoreUnavailable
from mooncake.core.keys import object_key
from mooncake.core.messages import Drain, Send
from mooncake.core.types import KvSource
from mooncake.engine.attempts import (
    AbortSequence,
    CloseSource,
    ListBlocks,
    LoadBlocks,
    OpenSource,
    PeerGone,
    PeerOpened,
    Received,
    RunSequence,
    SourceOpened,
    Tick,
)
from mooncake.engine.build import EngineParts
from mooncake.engine.shell import InstanceShell
from mooncake.engine.stepped import SteppedHost
from mooncake.prefill import service as prefill
from mooncake.prefill.core import CommitKv, KvCommitted, KvReserved, ReleaseKv, ReserveKv
from mooncake.rpc.driver import CoreDriver
from mooncake.rpc.stream import Link
from mooncake.store.core import StoreCore
from mooncake.store.events import Request
from mooncake.store.memory import MemoryNode, MemoryStore
from mooncake.store.operations import StoreOperations
from tests.engine.fakes import BLOCK, FakeStepEngine, ListeningCore, contents
from tests.engine.jobs import make_job, make_source

SHARD = bytes(8)
SOURCE = make_source(1, 21)
KEYS = [object_key(key, SHARD) for key in (*SOURCE.block_keys, SOURCE.partial_key)]
DRAIN = Drain("i0")


class FakeEngine:
    """Keeps what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def submit(
        self, seq: int, job: Any, *, one_token: bool, reader: Any = None, writer: Any = None, turn: int = 0
    ) -> None:
        self.calls.append((seq, one_token, reader and reader.num_tokens, writer and writer.num_tokens))

    def load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int, reader: Any) -> None:
        self.calls.append((seq, block_keys, start, reader.num_tokens))

    def list_blocks(self) -> None:
        self.calls.append(("list_blocks",))

    def abort(self, seq: int) -> None:
        self.calls.append(("abort", seq))

    def close(self) -> None:
        pass


class FakeLink:
    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


class Broken(MemoryStore):
    """Its node is lost in the middle of every call of these kinds."""

    def __init__(self, node: MemoryNode, *kinds: str) -> None:
        super().__init__(node)
        self._kinds = kinds

    async def _call(self, request: Request, deadline_s: float) -> Any:
        if type(request).__name__ in self._kinds:
            raise StoreUnavailable("the node is gone")
        return await super()._call(request, deadline_s)


class Instance:
    """A shell between a core that listens, an engine that remembers, and a store in this process."""

    def __init__(self, *broken: str, num_objects: int = 10) -> None:
        core = StoreCore(num_objects * 64, epoch=1, alignment=64)
        self.node = MemoryNode(num_objects * 64, core=core)
        self.client = Broken(self.node, *broken)
        self.core = ListeningCore()
        self.engine = FakeEngine()
        self.shell = InstanceShell(self._store_for, SHARD, BLOCK)
        self.shell.engine = self.engine
        self.shell.driver = CoreDriver(self.core, lambda command: None, Tick())
        prefill._add_actions(
            self.shell,
            cast(Any, self.client),
            EngineParts(SteppedHost(FakeStepEngine()), "model", SHARD, "compat"),
        )

    async def _store_for(self, source: KvSource) -> StoreOperations:
        if source.node == "unknown":
            raise StoreUnavailable("no address leads to the store node")
        return self.client

    async def answers(self, *commands: Any) -> list[Any]:
        """Performs them one after the other, and gives the events that the core gets of it."""
        before = len(self.core.events)
        for command in commands:
            self.shell.perform(command)
            await asyncio.sleep(0)  # a store in this process makes no call wait
        return self.core.events[before:]

    async def put(self, *indices: int) -> None:
        keys, data = [KEYS[at] for at in indices], [contents(21)[at] for at in indices]
        other = MemoryStore(self.node)
        await other.commit(await other.reserve(keys, list(map(len, data))))

    @property
    def held(self) -> tuple[int, int]:
        """Reservations and leases."""
        metrics = self.node.core.metrics()
        return metrics["reservations"], metrics["leases"]


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


# ---------------------------------------------------------------- sources


def test_a_source_is_opened_run_from_and_closed() -> None:
    async def main() -> None:
        instance = Instance()
        await instance.put(0, 1, 2)
        assert await instance.answers(OpenSource(1, SOURCE)) == [SourceOpened(1, 21)]
        await instance.answers(RunSequence(1, make_job(1), 21), RunSequence(2, make_job(2), 0, one_token=True))
        assert instance.engine.calls == [(1, False, 21, None), (2, True, None, None)]
        assert instance.held == (0, 3)
        assert await instance.answers(CloseSource(1)) == []
        assert instance.held == (0, 0)

    run(main)


def test_blocks_are_loaded_ahead_from_an_open_source() -> None:
    async def main() -> None:
        instance = Instance()
        await instance.put(0, 1)
        source = KvSource("n0", 16, SOURCE.block_keys)
        assert await instance.answers(OpenSource(1, source)) == [SourceOpened(1, 16)]
        await instance.answers(LoadBlocks(1, SOURCE.block_keys, 8))
        assert instance.engine.calls == [(1, SOURCE.block_keys, 8, 16)]
        await instance.answers(ListBlocks())
        assert instance.engine.calls[1:] == [("list_blocks",)]
        await instance.answers(CloseSource(1))
        assert instance.held == (0, 0)

    run(main)


@pytest.mark.parametrize(("present", "num_tokens", "num_leases"), [((0, 2), 8, 2), ((1, 2), 0, 0), ((), 0, 0)])
def test_a_source_with_a_gap_is_what_comes_before_it(
    present: tuple[int, ...], num_tokens: int, num_leases: int
) -> None:
    async def main() -> None:
        instance = Instance()
        if present:
            await instance.put(*present)
        assert await instance.answers(OpenSource(1, SOURCE)) == [SourceOpened(1, num_tokens)]
        assert instance.held == (0, num_leases), "of an empty source nothing is held"

    run(main)


@pytest.mark.parametrize("broken", ["unknown node", "Lease", "Release"])
def test_a_store_that_fails_is_an_empty_source(broken: str) -> None:
    """Release fails where it gives back leases that are of no use."""

    async def main() -> None:
        instance = Instance(broken)
        await instance.put(1, 2)
        node = "unknown" if broken == "unknown node" else "n0"
        source = KvSource(node, 21, SOURCE.block_keys, SOURCE.partial_key)
        assert await instance.answers(OpenSource(1, source)) == [SourceOpened(1, 0)]
        await instance.client.close()
        assert instance.held == (0, 0)

    run(main)


def test_a_source_whose_node_is_gone_can_be_closed() -> None:
    async def main() -> None:
        instance = Instance("Release")
        await instance.put(0, 1, 2)
        assert await instance.answers(OpenSource(1, SOURCE), CloseSource(1)) == [SourceOpened(1, 21)]
        await instance.client.close()
        assert instance.held == (0, 0)

    run(main)


# ---------------------------------------------------------------- targets


def test_a_target_is_reserved_written_to_committed_and_released() -> None:
    async def main() -> None:
        instance = Instance()
        assert await instance.answers(ReserveKv(1, SOURCE)) == [KvReserved(1, True)]
        await instance.answers(RunSequence(1, make_job(1), 0, one_token=True, store=True))
        assert instance.engine.calls == [(1, True, None, 21)]
        commits = await instance.answers(CommitKv(1, 0, 1), CommitKv(1, 1, 3))
        assert commits == [KvCommitted(1, 0, 1, True), KvCommitted(1, 1, 3, True)]
        assert instance.held == (0, 3)
        assert await instance.answers(ReleaseKv(1)) == []
        assert instance.held == (0, 0)

    run(main)


def test_a_store_without_room_is_a_refusal_and_nothing_is_held() -> None:
    async def main() -> None:
        instance = Instance(num_objects=2)
        assert await instance.answers(ReserveKv(1, SOURCE)) == [KvReserved(1, False)]
        assert instance.held == (0, 0)

    run(main)


def test_a_store_that_fails_is_a_refusal_that_says_so() -> None:
    async def main() -> None:
        instance = Instance("Reserve")
        assert await instance.answers(ReserveKv(1, SOURCE)) == [KvReserved(1, False, reachable=False)]

    run(main)


def test_a_commit_that_fails_is_answered_and_the_rest_is_let_go() -> None:
    async def main() -> None:
        instance = Instance("Commit")
        commits = await instance.answers(ReserveKv(1, SOURCE), CommitKv(1, 0, 2))
        assert commits == [KvReserved(1, True), KvCommitted(1, 0, 2, False)]
        assert await instance.answers(ReleaseKv(1)) == []
        assert instance.shell.writers == {}
        await instance.client.close()
        assert instance.held == (0, 0)

    run(main)


# ---------------------------------------------------------------- links and the end


def test_messages_go_over_the_newest_link_of_a_peer_and_to_nobody_without_one() -> None:
    async def main() -> None:
        instance = Instance()
        shell, old, new = instance.shell, FakeLink("f0"), FakeLink("f0")
        shell.opened(cast(Link, old))
        shell.opened(cast(Link, new))
        await instance.answers(Send("f0", DRAIN), Send("f1", DRAIN))
        assert (old.sent, new.sent) == ([], [DRAIN])
        shell.closed(cast(Link, old))
        shell.received(cast(Link, new), [DRAIN, DRAIN])
        shell.closed(cast(Link, new))
        await instance.answers(Send("f0", DRAIN))
        assert new.sent == [DRAIN]
        assert instance.core.events == [
            PeerOpened("f0"),
            PeerOpened("f0"),
            Received("f0", DRAIN),
            Received("f0", DRAIN),
            PeerGone("f0"),
        ], "a link that was replaced is nobody's loss"

    run(main)


def test_an_abort_goes_to_the_engine() -> None:
    async def main() -> None:
        instance = Instance()
        await instance.answers(AbortSequence(4))
        assert instance.engine.calls == [("abort", 4)]

    run(main)


def test_close_ends_calls_that_are_under_way() -> None:
    async def main() -> None:
        instance = Instance()
        ended: list[str] = []

        async def never() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("never")

        instance.shell.spawn(never())
        await asyncio.sleep(0)
        await instance.shell.close()
        assert ended == ["never"]

    run(main)
