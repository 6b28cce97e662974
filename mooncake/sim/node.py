"""A store node in virtual time, and its clients. The core is the real one; of the data only its length and progress exist.

A client is the data connection of one life of an instance to one life of a node, with its own number at the core, as live. It
ends with either process, or when the network between them is cut; then all its calls and transfers fail and its claims go.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from mooncake.core.keys import SHARD_BYTES, block_keys_of, object_keys
from mooncake.core.messages import (
    CONDUCTOR,
    AnyMessage,
    CacheDelta,
    CacheSnapshot,
    CopyBlocks,
    NodeInfo,
    RegisterNode,
    SnapshotRequest,
)
from mooncake.core.types import KvSource
from mooncake.sim.links import Link, transfer
from mooncake.sim.loop import CoreRunner, Loop, Observer
from mooncake.sim.network import Network
from mooncake.store.allocator import Budget
from mooncake.store.core import StoreCore
from mooncake.store.events import (
    Cancel,
    ClientGone,
    Commit,
    Fault,
    Lease,
    ReadSsd,
    Release,
    Reply,
    Report,
    Request,
    Reserve,
    Snapshot,
    SnapshotWanted,
    SsdJob,
    SsdRead,
    SsdRecovered,
    SsdRests,
    SsdWritten,
    Tick,
    Usage,
    WriteSsd,
)
from mooncake.store.eviction import POLICIES
from mooncake.store.ssd import SsdConfig
from mooncake.store.ssd_layout import geometry_of
from mooncake.store.types import CommitStatus, Location, Places, Puts, PutStatus, num_existing

SHARD = bytes(SHARD_BYTES)
"""Of all objects: an engine whose KV has no bytes has one layout."""
_RESERVED, _COMMITTED, _EXISTS = PutStatus.RESERVED, CommitStatus.COMMITTED, CommitStatus.EXISTS

EXTENT_BLOCKS = 16
"""At least as many are in an extent of a simulated SSD."""

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
    eviction: str = "lru"
    quotas: dict[str, int] = {}
    """Bytes of memory by tenant."""
    ssd_bytes: int = 0
    """Of the tier below memory; 0: there is none."""
    ssd_bytes_per_s: float = 6e9
    """Reads and writes together."""
    fault: float = 0.0
    """Share of transfers that fail, as with a corrupt block or a broken path."""
    ssd_fault: float = 0.0
    """Share of objects that cannot be written to SSD or read from it."""
    checked: bool = True
    """Whether every byte's claim and arrival is checked, as memory protection does it live; it takes time for each object."""


class Copier(Protocol):
    """What a node copies from others (`mooncake.sim.copier`)."""

    def wish(self, message: CopyBlocks) -> None: ...

    def kill(self) -> None: ...

    def lose_node(self, node: str) -> None:
        """The network to that node was cut."""
        ...


class SimNode:
    """copier is set by the cluster before the first event, as it needs this object to exist. on_ssd: what the life before left
    on SSD."""

    copier: Copier

    def __init__(
        self,
        name: str,
        epoch: int,
        config: NodeConfig,
        loop: Loop,
        network: Network,
        observe: Observer | None,
        chance: Callable[[float], bool],
        on_ssd: SsdRecovered | None = None,
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.config = config
        self.core = StoreCore(
            config.capacity_bytes,
            epoch=epoch,
            policy=POLICIES[config.eviction](),
            allocator=Budget(config.capacity_bytes, config.alignment),
            ssd=_ssd_config(config),
            quotas=config.quotas,
        )
        self.memory = Link(f"{name}.memory", config.local_bytes_per_s)
        self.nic_in = Link(f"{name}.in", config.nic_bytes_per_s)
        self.nic_out = Link(f"{name}.out", config.nic_bytes_per_s)
        self.ssd = Link(f"{name}.ssd", config.ssd_bytes_per_s)
        self.loop = loop
        self.chance = chance
        self._network = network
        self._clients: dict[int, NodeClient] = {}
        self._numbers = itertools.count(1)
        self._written: dict[int, int] = {}
        """Bytes that arrived of each object that is not committed yet, if that is checked."""
        actions: dict[type, Callable[[Any], None]] = {
            Reply: self._reply,
            Fault: self._fault,
            Report: self._report,
            Usage: lambda command: None,  # for a directory, which the Conductor is not in this
            Snapshot: self._snapshot,
            WriteSsd: self._ssd_job,
            ReadSsd: self._ssd_job,
            SsdRests: self._ssd_rests,
        }
        self.runner = CoreRunner(loop, name, self.core, actions, Tick(), observe)
        self.handle = self.runner.handle
        if on_ssd is not None:
            self.handle(on_ssd)

    # ------------------------------------------------------------------ process

    def kill(self) -> None:
        self.runner.stop()
        self.copier.kill()
        for client in list(self._clients.values()):
            self.loop.after(self.config.call_ns, client.lose)

    def opened(self, peer: str) -> None:
        info = NodeInfo(self.name, self.epoch, (f"sim:{self.name}",), self.config.capacity_bytes)
        self._network.send(self.name, CONDUCTOR, RegisterNode(info))
        self.runner.handle(SnapshotWanted())

    def gone(self, peer: str) -> None:
        """Reports are lost until the Conductor is back and gets a snapshot."""

    def received(self, sender: str, messages: list[AnyMessage]) -> None:
        for message in messages:
            if isinstance(message, SnapshotRequest):
                self.runner.handle(SnapshotWanted())
            elif isinstance(message, CopyBlocks):
                self.copier.wish(message)

    # ------------------------------------------------------------------ clients

    def attach(self, instance: str, home: SimNode | None) -> NodeClient:
        """home: the node of the client's own machine, if it is alive; its NIC is the other end of a transfer."""
        number = next(self._numbers)
        client = self._clients[number] = NodeClient(self, number, instance, home)
        return client

    def detach(self, client: NodeClient) -> None:
        """Its end of the connection closed: the claims go when the node sees it."""
        if self._clients.pop(client.number, None) is not None:
            self.loop.after(self.config.call_ns, self.handle, ClientGone(client.number))

    def note_written(self, number: int, num_bytes: int) -> None:
        self._written[number] = self._written.get(number, 0) + num_bytes

    def take_written(self, location: Location) -> None:
        """It is committed now: nobody may commit what has not arrived."""
        arrived = self._written.pop(location.generation, 0)
        assert arrived >= location.size, f"object {location.generation}: {arrived} of {location.size} bytes arrived"

    # ------------------------------------------------------------------ commands

    def _reply(self, command: Reply) -> None:
        client = self._clients.get(command.client)
        if client is not None and client.awaits(command.request_id):
            self.loop.after(self.config.call_ns, client.replied, command.request_id, command.results)

    def _fault(self, command: Fault) -> None:
        raise AssertionError(f"{self.name} calls a request invalid: {command.detail}")

    def _report(self, command: Report) -> None:
        added, removed = block_keys_of(command.added), block_keys_of(command.removed)
        self._tell(CacheDelta(self.name, command.epoch, command.seq, command.tier, added, removed))

    def _snapshot(self, command: Snapshot) -> None:
        self._tell(CacheSnapshot(self.name, command.epoch, command.seq, command.tier, block_keys_of(command.keys)))

    def _ssd_job(self, command: SsdJob) -> None:
        self.loop.at(transfer([self.ssd], sum(command.sizes), self.loop.now), self._ssd_done, command)

    def _ssd_done(self, command: SsdJob) -> None:
        failed = tuple([at for at in range(len(command.keys)) if self.chance(self.config.ssd_fault)])
        done = SsdWritten if isinstance(command, WriteSsd) else SsdRead
        self.handle(done(command.job, failed))

    def _ssd_rests(self, command: SsdRests) -> None:
        """A live node logs it; here the counters say it."""

    def _tell(self, message: AnyMessage) -> None:
        self._network.send(self.name, CONDUCTOR, message)


def _ssd_config(config: NodeConfig) -> SsdConfig:
    """An object lies in one extent, so that one that holds few of them wastes space: here their size is known."""
    if not config.ssd_bytes:
        return SsdConfig()
    blocks = EXTENT_BLOCKS * config.block_tokens * config.token_bytes
    extent = max(geometry_of(config.ssd_bytes).extent_bytes, min(blocks, config.ssd_bytes // 2))
    return SsdConfig(config.ssd_bytes, extent_bytes=extent)


class NodeClient:
    """Calls and transfers of one instance at one node. All of them end, `lost` ones with None or False."""

    def __init__(self, node: SimNode, number: int, instance: str, home: SimNode | None) -> None:
        self.node = node
        self.number = number
        self.instance = instance
        self.lost = False
        self.is_local = home is node
        self._ids = itertools.count(1)
        self._pending: dict[int, OnReply] = {}
        self._path_in, self._path_out = [node.memory], [node.memory]
        if not self.is_local:
            self._path_in += [node.nic_in, *([home.nic_out] if home is not None else [])]
            self._path_out += [node.nic_out, *([home.nic_in] if home is not None else [])]

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

    def call(self, kind: Callable[..., Request], on_reply: OnReply | None, *arguments: Any, **more: Any) -> None:
        """kind: of the request, to which the arguments go. on_reply is never called before this returns."""
        node, request_id = self.node, next(self._ids)
        if on_reply is not None:
            self._pending[request_id] = on_reply
        if self.lost:
            node.loop.after(node.config.call_ns, self.replied, request_id, None)
        else:
            node.loop.after(node.config.call_ns, self._arrive, kind(self.number, request_id, *arguments, **more))

    def _arrive(self, request: Request) -> None:
        if not self.lost:
            self.node.handle(request)

    def awaits(self, request_id: int) -> bool:
        return request_id in self._pending

    def replied(self, request_id: int, results: Any) -> None:
        on_reply = self._pending.pop(request_id, None)
        if on_reply is not None:
            on_reply(results)

    def copy(self, locations: Sequence[Location], num_bytes: int, write: bool, done: Callable[[bool], None]) -> None:
        """Move bytes between the instance and objects, given if claims are checked. done(ok) when the last have arrived."""
        node, request_id = self.node, next(self._ids)
        self._pending[request_id] = lambda ok: done(bool(ok))
        arrives = transfer(self._path_in if write else self._path_out, num_bytes, node.loop.now)
        node.loop.at(arrives, self._copied, request_id, locations, write)

    def _copied(self, request_id: int, locations: Sequence[Location], write: bool) -> None:
        """It went well if no fault was injected, and the claims lasted to its end."""
        held = not locations or self._may(locations, write)
        self.replied(request_id, held and not self.lost and not self.node.chance(self.node.config.fault))

    def _may(self, locations: Sequence[Location], write: bool) -> bool:
        allows = self.node.core.allows
        held = all(allows(self.number, at.generation, at.offset, at.size, write) for at in locations)
        if not held and not write and not self.lost:
            raise AssertionError(f"{self.instance} reads objects of {self.node.name} without a lease")
        return held


class SimSource:
    """Leased leading objects of a source (`mooncake.engine.kv_objects.SourceReader`)."""

    def __init__(
        self, client: NodeClient, source: KvSource, on_opened: Callable[[int], None], tenant: str = ""
    ) -> None:
        self.num_tokens = 0
        self.ssd_tokens = 0
        """Of these, those that were read from SSD for it."""
        self._client = client
        self._source = source
        self._locations: list[Location | None] = []
        """If claims are checked."""
        self._held: tuple[int, ...] = ()
        keys = _object_keys(source.block_keys, source.partial_key)
        # on_opened is not kept: it may hold this object, and what is no cycle is freed at once.
        client.call(Lease, lambda found: self._leased(found, on_opened), keys, tenant)

    def copy(self, start: int, end: int, done: Callable[[bool], None]) -> None:
        config = self._client.node.config
        first, last = start // config.block_tokens, -(-end // config.block_tokens)
        locations = [location for location in self._locations[first:last] if location is not None]
        self._client.copy(locations, (end - start) * config.token_bytes, False, done)

    @property
    def is_local(self) -> bool:
        """Whether it lies on the instance's own machine."""
        return self._client.is_local

    def close(self) -> None:
        if self._held:
            self._client.call(Release, None, self._held)

    def _leased(self, results: Places | None, on_opened: Callable[[int], None]) -> None:
        config, numbers = self._client.node.config, () if results is None else results.numbers
        self._held = tuple(filter(None, numbers))
        if config.checked and results is not None:
            self._locations = results.locations()
        if len(self._held) < len(numbers):
            self.num_tokens = numbers.index(None) * config.block_tokens
        else:
            self.num_tokens = self._source.num_tokens if numbers else 0
        num_loaded = 0 if results is None else results.num_loaded
        self.ssd_tokens = min(self.num_tokens, num_loaded * config.block_tokens)
        if not self.num_tokens:
            self.close()
        on_opened(self.num_tokens)


class SimTarget:
    """Objects reserved for a sequence (`mooncake.engine.kv_objects.TargetWriter`): blocks, and the ephemeral last one."""

    def __init__(
        self, client: NodeClient, target: KvSource, on_reserved: Callable[[bool], None], tenant: str = ""
    ) -> None:
        self.num_tokens = target.num_tokens
        self.num_stored = 0
        """Leading objects that exist already."""
        self._client = client
        self._config = config = client.node.config
        self._numbers: tuple[int | None, ...] = ()
        self._open: list[int | None] = []
        """By index, the number of what is reserved and not committed."""
        self._locations: list[Location | None] = []
        """If claims are checked."""
        num_blocks = len(target.block_keys)
        keys = _object_keys(target.block_keys, target.partial_key)
        sizes = (config.block_tokens * config.token_bytes,) * num_blocks
        partial = bool(target.partial_key)
        if partial:
            sizes += ((target.num_tokens - num_blocks * config.block_tokens) * config.token_bytes,)
        client.call(
            Reserve,
            lambda puts: self._answered(puts, on_reserved),
            keys,
            sizes,
            lease_existing=True,
            all_or_nothing=True,
            ephemeral_last=partial,
            tenant=tenant,
        )

    def copy(self, start: int, end: int, done: Callable[[bool], None]) -> None:
        """Write what is not there yet of tokens [start, end)."""
        tokens, token_bytes = self._config.block_tokens, self._config.token_bytes
        end = min(end, self.num_tokens)
        first, last = start // tokens, -(-end // tokens)
        if self._config.checked:
            done = self._noting(start, end, done)
        num_tokens = end - start
        for at in range(first, last) if None in self._open[first:last] else ():
            if self._open[at] is None:
                num_tokens -= min(end, (at + 1) * tokens) - max(start, at * tokens)
        self._client.copy(self._open_locations(first, last), num_tokens * token_bytes, True, done)

    def _noting(self, start: int, end: int, done: Callable[[bool], None]) -> Callable[[bool], None]:
        """Which bytes of which objects arrive."""
        tokens, token_bytes = self._config.block_tokens, self._config.token_bytes
        open_at = [(at, number) for at, number in enumerate(self._open) if number is not None]

        def arrived(ok: bool) -> None:
            for at, number in open_at if ok else ():
                count = min(end, (at + 1) * tokens) - max(start, at * tokens)
                if count > 0:
                    self._client.node.note_written(number, count * token_bytes)
            done(ok)

        return arrived

    def _open_locations(self, first: int, last: int) -> list[Location]:
        if not self._config.checked:
            return []
        pairs = zip(self._open[first:last], self._locations[first:last], strict=False)
        return [location for number, location in pairs if number is not None and location is not None]

    def open_blocks(self) -> list[tuple[int, int]]:
        """Token ranges of the blocks that are to be written."""
        tokens = self._config.block_tokens
        return [(at * tokens, (at + 1) * tokens) for at, number in enumerate(self._open) if number is not None]

    def commit(self, first: int, last: int, done: Callable[[bool], None]) -> None:
        for location in self._open_locations(first, last):
            self._client.node.take_written(location)
        numbers = tuple(filter(None, self._open[first:last]))
        if not numbers:
            self._client.node.loop.after(0, lambda: done(not self._client.lost))
            return
        self._open[first:last] = [None] * len(self._open[first:last])
        self._client.call(
            Commit, lambda results: done(results is not None and _all_there(results)), numbers, lease=True
        )

    def close(self) -> None:
        """Cancel what is not committed, release the rest."""
        reserved, leased = tuple(filter(None, self._open)), tuple(filter(None, self._numbers))
        if reserved:
            open_numbers = dict.fromkeys(reserved)
            leased = tuple([number for number in leased if number not in open_numbers])
            self._client.call(Cancel, None, reserved)
        if leased:
            self._client.call(Release, None, leased)

    def _answered(self, results: Puts | None, on_reserved: Callable[[bool], None]) -> None:
        if results is not None:
            self._numbers = results.numbers
            self.num_stored = num_existing(results.statuses)
            pairs = zip(results.numbers, results.statuses, strict=True)
            self._open = [number if status is _RESERVED else None for number, status in pairs]
            if self._config.checked:
                self._locations = results.locations()
        granted = results is not None and None not in results.numbers
        if not granted:
            self.close()
        on_reserved(granted)


def _all_there(statuses: tuple[CommitStatus, ...]) -> bool:
    return statuses.count(_COMMITTED) == len(statuses) or all(status in (_COMMITTED, _EXISTS) for status in statuses)


@functools.lru_cache(maxsize=1024)
def _object_keys(block_keys: tuple[bytes, ...], partial_key: bytes) -> tuple[bytes, ...]:
    """What prefill reserves, decode leases a moment later."""
    return object_keys((*block_keys, partial_key) if partial_key else block_keys, SHARD)
