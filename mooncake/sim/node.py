"""A store node in virtual time, and its clients. The core is the real one; of the data only its length and progress exist.

A client is the data connection of one life of an instance to one life of a node, with its own number at the core, as live. It
ends with either process, or when the network between them is cut; then all its calls and transfers fail and its claims go.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mooncake.core.keys import SHARD_BYTES, object_key
from mooncake.core.messages import (
    CONDUCTOR,
    AnyMessage,
    CacheDelta,
    CacheSnapshot,
    NodeInfo,
    RegisterNode,
    SnapshotRequest,
)
from mooncake.core.types import KvSource, Tier
from mooncake.sim.links import Link, transfer
from mooncake.sim.loop import CoreRunner, Loop, Observer
from mooncake.sim.network import Network
from mooncake.store.core import StoreCore
from mooncake.store.events import (
    Cancel,
    ClientGone,
    Command,
    Commit,
    Fault,
    Lease,
    Release,
    Reply,
    Report,
    Request,
    Reserve,
    Snapshot,
    SnapshotWanted,
    Tick,
)
from mooncake.store.types import CommitStatus, Location, Put, PutStatus

_SHARD = bytes(SHARD_BYTES)
_HELD = (PutStatus.RESERVED, PutStatus.EXISTS)
_THERE = (CommitStatus.COMMITTED, CommitStatus.EXISTS)

OnReply = Callable[[Any], None]
"""Gets the results, or None if the call failed."""


class NodeConfig(msgspec.Struct, frozen=True):
    capacity_bytes: int = 1 << 30
    token_bytes: int = 1024
    """KV of one token, all layers."""
    block_tokens: int = 64
    alignment: int = 4096
    call_ns: int = 60_000
    """One way of a call on the data connection."""
    local_bytes_per_s: float = 10e9
    """Between the segment and instances of the same machine."""
    nic_bytes_per_s: float = 5e9
    fault: float = 0.0
    """Share of transfers that fail, as with a corrupt block or a broken path."""


class SimNode:
    def __init__(
        self,
        name: str,
        epoch: int,
        config: NodeConfig,
        loop: Loop,
        network: Network,
        observe: Observer,
        chance: Callable[[float], bool],
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.config = config
        self.core = StoreCore(config.capacity_bytes, epoch=epoch, alignment=config.alignment)
        self.runner = CoreRunner(loop, name, self.core, self._perform, Tick(), observe)
        self.memory = Link(f"{name}.memory", config.local_bytes_per_s)
        self.nic_in = Link(f"{name}.in", config.nic_bytes_per_s)
        self.nic_out = Link(f"{name}.out", config.nic_bytes_per_s)
        self.loop = loop
        self.chance = chance
        self._network = network
        self._clients: dict[int, NodeClient] = {}
        self._numbers = itertools.count(1)
        self._written: dict[int, int] = {}
        """Bytes that arrived of each object that is not committed yet."""

    # ------------------------------------------------------------------ process

    def kill(self) -> None:
        self.runner.stop()
        for client in list(self._clients.values()):
            self.loop.after(self.config.call_ns, client.lose)

    def opened(self, peer: str) -> None:
        info = NodeInfo(self.name, self.epoch, (f"sim:{self.name}",), self.config.capacity_bytes)
        self._network.send(self.name, CONDUCTOR, RegisterNode(info))
        self.runner.handle(SnapshotWanted())

    def gone(self, peer: str) -> None:
        """Reports are lost until the Conductor is back and gets a snapshot."""

    def received(self, sender: str, message: AnyMessage) -> None:
        if isinstance(message, SnapshotRequest):
            self.runner.handle(SnapshotWanted())

    # ------------------------------------------------------------------ clients

    def attach(self, instance: str, is_local: bool) -> NodeClient:
        number = next(self._numbers)
        client = self._clients[number] = NodeClient(self, number, instance, is_local)
        return client

    def detach(self, client: NodeClient) -> None:
        """Its end of the connection closed: the claims go when the node sees it."""
        if self._clients.pop(client.number, None) is not None:
            self.loop.after(self.config.call_ns, lambda: self.runner.handle(ClientGone(client.number)))

    def handle(self, request: Request) -> None:
        self.runner.handle(request)

    def note_written(self, location: Location, num_bytes: int) -> None:
        self._written[location.generation] = self._written.get(location.generation, 0) + num_bytes

    def take_written(self, location: Location) -> None:
        """It is committed now: nobody may commit what has not arrived."""
        arrived = self._written.pop(location.generation, 0)
        assert arrived >= location.size, f"object {location.generation}: {arrived} of {location.size} bytes arrived"

    def _perform(self, command: Command) -> None:
        match command:
            case Reply():
                client = self._clients.get(command.client)
                if client is not None:
                    self.loop.after(self.config.call_ns, lambda: client.replied(command.request_id, command.results))
            case Fault():
                raise AssertionError(f"{self.name} calls a request invalid: {command.detail}")
            case Report():
                self._tell(
                    CacheDelta(
                        self.name,
                        command.epoch,
                        command.seq,
                        Tier.DRAM,
                        _blocks(command.added),
                        _blocks(command.removed),
                    )
                )
            case Snapshot():
                self._tell(CacheSnapshot(self.name, command.epoch, command.seq, Tier.DRAM, _blocks(command.keys)))

    def _tell(self, message: AnyMessage) -> None:
        self._network.send(self.name, CONDUCTOR, message)


def _blocks(keys: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The directory knows blocks; which shard of them this is follows from the instances' compatibility."""
    return tuple(key[:-SHARD_BYTES] for key in keys)


class NodeClient:
    """Calls and transfers of one instance at one node. All of them end, `lost` ones with None or False."""

    def __init__(self, node: SimNode, number: int, instance: str, is_local: bool) -> None:
        self.node = node
        self.number = number
        self.instance = instance
        self.lost = False
        self._is_local = is_local
        self._ids = itertools.count(1)
        self._pending: dict[int, OnReply] = {}

    def close(self) -> None:
        """The instance is no more: nobody waits for anything."""
        self._pending.clear()
        self.lost = True
        self.node.detach(self)

    def lose(self) -> None:
        """The connection broke: everything under way fails."""
        if self.lost:
            return
        self.lost = True
        self.node.detach(self)
        pending, self._pending = self._pending, {}
        for on_reply in pending.values():
            on_reply(None)

    def call(self, request: Request, on_reply: OnReply) -> None:
        """`request` without client and request number. on_reply is never called before this returns."""
        node, request_id = self.node, next(self._ids)
        self._pending[request_id] = on_reply
        if self.lost:
            node.loop.after(node.config.call_ns, lambda: self.replied(request_id, None))
            return
        named = msgspec.structs.replace(request, client=self.number, request_id=request_id)
        node.loop.after(node.config.call_ns, lambda: node.handle(named) if not self.lost else None)

    def replied(self, request_id: int, results: Any) -> None:
        on_reply = self._pending.pop(request_id, None)
        if on_reply is not None:
            on_reply(results)

    def copy(self, locations: Sequence[Location], num_bytes: int, write: bool, done: Callable[[bool], None]) -> None:
        """Move bytes between these objects and the instance. done(ok) when the last one has arrived."""
        node, request_id = self.node, next(self._ids)
        self._pending[request_id] = lambda ok: done(bool(ok))
        path = [node.memory] if self._is_local else [node.memory, node.nic_in if write else node.nic_out]
        arrives = transfer(path, num_bytes, node.loop.now)
        node.loop.at(arrives, lambda: self.replied(request_id, self._may(locations, write)))

    def _may(self, locations: Sequence[Location], write: bool) -> bool:
        """Whether the copy went well: no fault was injected, and the claims lasted to its end."""
        node = self.node
        allows = node.core.allows
        held = all(allows(self.number, at.generation, at.offset, at.size, write) for at in locations)
        if not held and not write and not self.lost:
            raise AssertionError(f"{self.instance} reads objects of {node.name} without a lease")
        return held and not self.lost and not node.chance(node.config.fault)


class SimSource:
    """Leased leading objects of a source (`mooncake.engine.kv_objects.SourceReader`)."""

    def __init__(self, client: NodeClient, source: KvSource, on_opened: Callable[[int], None]) -> None:
        self.num_tokens = 0
        self._client = client
        self._source = source
        self._block_tokens = client.node.config.block_tokens
        self._locations: list[Location] = []
        self._held: list[int] = []
        self._on_opened = on_opened
        keys = tuple(object_key(key, _SHARD) for key in _keys(source))
        client.call(Lease(0, 0, keys), self._leased)

    def copy(self, start: int, end: int, done: Callable[[bool], None]) -> None:
        first, last = start // self._block_tokens, -(-end // self._block_tokens)
        num_bytes = (end - start) * self._client.node.config.token_bytes
        self._client.copy(self._locations[first:last], num_bytes, False, done)

    def close(self) -> None:
        if self._held:
            self._client.call(Release(0, 0, tuple(self._held)), _ignore)

    def _leased(self, results: Any) -> None:
        for result in results or ():
            if not isinstance(result, Location):
                break
            self._locations.append(result)
        self._held = [result.generation for result in results or () if isinstance(result, Location)]
        whole = len(self._locations) == len(results or ())
        self.num_tokens = self._source.num_tokens if whole and results else len(self._locations) * self._block_tokens
        if not self.num_tokens:
            self.close()
        self._on_opened(self.num_tokens)


class SimTarget:
    """Objects reserved for a sequence (`mooncake.engine.kv_objects.TargetWriter`): blocks, and the ephemeral last one."""

    def __init__(self, client: NodeClient, target: KvSource, on_reserved: Callable[[bool], None]) -> None:
        self.num_tokens = target.num_tokens
        self._client = client
        self._config = client.node.config
        self._puts: list[Put] = []
        self._committed: dict[int, None] = {}
        self._on_reserved = on_reserved
        blocks = tuple(object_key(key, _SHARD) for key in target.block_keys)
        partial = (object_key(target.partial_key, _SHARD),) if target.partial_key else ()
        self._num_blocks = len(blocks)
        self._answers: dict[bool, tuple[Put, ...] | None] = {}
        self._num_calls = bool(blocks) + bool(partial)
        block_bytes = self._config.block_tokens * self._config.token_bytes
        rest = (target.num_tokens - len(blocks) * self._config.block_tokens) * self._config.token_bytes
        self._reserve(blocks, (block_bytes,) * len(blocks), ephemeral=False)
        self._reserve(partial, (rest,) * len(partial), ephemeral=True)

    def copy(self, start: int, end: int, done: Callable[[bool], None]) -> None:
        """Write what is not there yet of tokens [start, end)."""
        tokens, size = self._config.block_tokens, self._config.token_bytes
        pieces: list[tuple[Location, int]] = []
        for at in range(start // tokens, -(-min(end, self.num_tokens) // tokens)):
            put = self._puts[at]
            if put.status is PutStatus.RESERVED and at not in self._committed:
                count = min(end, (at + 1) * tokens, self.num_tokens) - max(start, at * tokens)
                assert put.location is not None
                pieces.append((put.location, count * size))

        def arrived(ok: bool) -> None:
            for location, num_bytes in pieces if ok else ():
                self._client.node.note_written(location, num_bytes)
            done(ok)

        self._client.copy([location for location, _ in pieces], sum(size for _, size in pieces), True, arrived)

    def commit(self, first: int, last: int, done: Callable[[bool], None]) -> None:
        at = [at for at in range(first, last) if self._puts[at].status is PutStatus.RESERVED]
        self._committed.update(dict.fromkeys(at))
        if not at:
            self._client.node.loop.after(0, lambda: done(not self._client.lost))
            return
        for put in (self._puts[index] for index in at):
            assert put.location is not None
            self._client.node.take_written(put.location)
        self._client.call(
            Commit(0, 0, self._numbers(at), lease=True),
            lambda results: done(results is not None and all(status in _THERE for status in results)),
        )

    def close(self) -> None:
        """Cancel what is not committed, release the rest."""
        both = range(len(self._puts))
        reserved = [at for at in both if self._puts[at].status is PutStatus.RESERVED and at not in self._committed]
        leased = [at for at in both if self._puts[at].status is PutStatus.EXISTS or at in self._committed]
        if reserved:
            self._client.call(Cancel(0, 0, self._numbers(reserved)), _ignore)
        if leased:
            self._client.call(Release(0, 0, self._numbers(leased)), _ignore)

    def _reserve(self, keys: tuple[bytes, ...], sizes: tuple[int, ...], *, ephemeral: bool) -> None:
        if keys:
            request = Reserve(0, 0, keys, sizes, lease_existing=True, all_or_nothing=True, ephemeral=ephemeral)
            self._client.call(request, lambda results: self._answered(ephemeral, results))

    def _answered(self, ephemeral: bool, results: tuple[Put, ...] | None) -> None:
        self._answers[ephemeral] = results
        if len(self._answers) < self._num_calls:
            return
        puts = [put for which in (False, True) for put in self._answers.get(which) or ()]
        granted = None not in self._answers.values() and all(put.status in _HELD for put in puts)
        self._puts = puts
        if not granted:
            self.close()
        self._on_reserved(granted)

    def _numbers(self, indices: Sequence[int]) -> tuple[int, ...]:
        locations = (self._puts[at].location for at in indices)
        return tuple(location.generation for location in locations if location is not None)


def _keys(source: KvSource) -> tuple[bytes, ...]:
    return (*source.block_keys, source.partial_key) if source.partial_key else source.block_keys


def _ignore(results: Any) -> None:
    pass
