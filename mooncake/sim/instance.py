"""A prefill or decode instance in virtual time: its service core, its engine, and its connections to store nodes.

What `mooncake.engine.shell` and `mooncake.prefill.service` are to live instances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.keys import partial_key
from mooncake.core.messages import AnyMessage, Send, StepTokens
from mooncake.core.types import PART_TOKENS, InstanceInfo, Job, Role
from mooncake.decode.core import DecodeCore
from mooncake.engine.attempts import (
    AbortSequence,
    CloseSource,
    EngineProgress,
    KvStored,
    ListBlocks,
    LoadBlocks,
    OpenSource,
    PeerGone,
    PeerOpened,
    Received,
    RunSequence,
    SourceOpened,
    TakeRole,
    Tick,
)
from mooncake.engine.base import EngineLimits
from mooncake.engine.core import EngineCore, LoadKv, StoreKv
from mooncake.prefill.core import CommitKv, KvCommitted, KvReserved, PrefillCore, PrefillLimits, ReleaseKv, ReserveKv
from mooncake.sim.engine import Done, EngineConfig, Oracle, SimEngine
from mooncake.sim.loop import CoreRunner, Loop, Observer
from mooncake.sim.network import Network
from mooncake.sim.node import NodeClient, SimSource, SimTarget
from mooncake.sim.step_times import Times


class InstanceConfig(msgspec.Struct, frozen=True):
    """limits: with the max_batch of whatever role it has."""

    limits: EngineLimits
    engine: EngineConfig
    max_queued: int = 1024
    part_tokens: int = PART_TOKENS


class TimedTokens(msgspec.Struct, frozen=True):
    """StepTokens of one step or many, with the time at which each token was computed, by (request, choice)."""

    message: StepTokens
    times: dict[tuple[int, int], Times]


ConnectNode = Callable[[str, str], NodeClient | None]
"""A new client at (node, for instance), or None if the node cannot be reached."""
Describe = Callable[[Role], InstanceInfo]
"""What the instance is in that role, under a new epoch."""


class SimInstance:
    def __init__(
        self,
        role: Role,
        describe: Describe,
        config: InstanceConfig,
        loop: Loop,
        network: Network,
        connect: ConnectNode,
        oracle: Oracle,
        observe: Observer | None,
        chance: Callable[[float], bool],
    ) -> None:
        self.info = info = describe(role)
        self.name = info.name
        self._config = config
        self._describe = describe
        self._loop = loop
        self._network = network
        self._connect = connect
        self._observe = observe
        self._times: dict[tuple[int, int], Times] = {}
        self._clients: dict[str, NodeClient] = {}
        self._sources: dict[int, SimSource] = {}
        self._targets: dict[int, SimTarget] = {}
        self.on_load: Callable[[Job, int, SimSource], None] | None = None
        """Told of each load for a prefill, with the number of tokens: for reports."""
        self._peers: dict[str, None] = {}
        """Those that it has a stream to."""
        self._actions: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            OpenSource: self._open_source,
            CloseSource: lambda command: self._sources.pop(command.seq).close(),
            RunSequence: self._run_sequence,
            LoadBlocks: lambda command: self.engine.load_ahead(command.seq, command.block_keys, command.start),
            ListBlocks: lambda command: self.engine.list_blocks(),
            AbortSequence: lambda command: self.engine.abort(command.seq),
            ReserveKv: self._reserve,
            CommitKv: self._commit,
            ReleaseKv: lambda command: self._targets.pop(command.seq).close(),
            TakeRole: lambda command: self._take_role(command.role),
        }
        engine_core = self._engine_core(info)
        self.engine = SimEngine(engine_core, config.engine, loop, self, oracle, self._progress, chance)
        self._start_core(info, engine_core)

    def _engine_core(self, info: InstanceInfo) -> EngineCore:
        limits = msgspec.structs.replace(self._config.limits, max_batch=info.max_batch)
        return EngineCore(limits, overlap_loads=info.role is Role.PREFILL, row_pages=None, has_memory=False)

    def _start_core(self, info: InstanceInfo, engine_core: EngineCore) -> None:
        config = self._config
        self.info = info
        self.core: PrefillCore | DecodeCore
        if info.role is Role.PREFILL:
            limits = PrefillLimits(config.max_queued, info.max_batch, config.part_tokens)
            self.core = PrefillCore(info, limits, config.limits.block_tokens, _partial_key, engine_core.refusal)
        else:
            self.core = DecodeCore(info, config.max_queued, engine_core.refusal)
        self.runner = CoreRunner(self._loop, self.name, self.core, self._actions, Tick(), self._observe)

    def _take_role(self, role: Role) -> None:
        """The core is drained. Until the engine has the other role's core as well, it goes on refusing."""
        info = self._describe(role)
        engine_core = self._engine_core(info)

        def replaced() -> None:
            if self.runner.alive:
                self.runner.stop()
                self._start_core(info, engine_core)
                for peer in self._peers:
                    self.runner.handle(PeerOpened(peer))

        self.engine.replace_core(engine_core, replaced)

    # ------------------------------------------------------------------ process

    def kill(self) -> None:
        self.runner.stop()
        self.engine.alive = False
        for client in self._clients.values():
            client.close()

    def opened(self, peer: str) -> None:
        self._peers[peer] = None
        self.runner.handle(PeerOpened(peer))

    def gone(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self.runner.handle(PeerGone(peer))

    def received(self, sender: str, messages: list[AnyMessage]) -> None:
        for message in messages:
            self.runner.handle(Received(sender, message))

    def lose_node(self, node: str) -> None:
        """The network to that node was cut."""
        client = self._clients.get(node)
        if client is not None:
            client.lose()

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return self.core.num_queued + self.engine.core.load.num_waiting

    @property
    def num_claims(self) -> int:
        """Sources and targets that are not closed."""
        return len(self._sources) + len(self._targets)

    # ------------------------------------------------------------------ commands

    def _send(self, command: Send) -> None:
        message = command.message
        if isinstance(message, StepTokens):
            self._network.send(self.name, command.to, TimedTokens(message, self._times))
        else:
            self._network.send(self.name, command.to, message)

    def _client(self, node: str) -> NodeClient | None:
        client = self._clients.get(node)
        if client is None or client.lost:
            client = self._connect(node, self.name)
            if client is not None:
                self._clients[node] = client
        return client

    def _open_source(self, command: OpenSource) -> None:
        client = self._client(command.source.node)
        if client is None:
            self._loop.after(0, self.runner.handle, SourceOpened(command.seq, 0))
            return

        def opened(num_tokens: int) -> None:
            if num_tokens:
                self._sources[command.seq] = source
            self.runner.handle(SourceOpened(command.seq, num_tokens))

        source = SimSource(client, command.source, opened, command.tenant)

    def _reserve(self, command: ReserveKv) -> None:
        client = self._client(command.target.node)
        if client is None:
            self._loop.after(0, self.runner.handle, KvReserved(command.seq, False, reachable=False))
            return

        def reserved(granted: bool) -> None:
            if granted:
                self._targets[command.seq] = target
            num_stored = target.num_stored if granted else 0
            self.runner.handle(KvReserved(command.seq, granted, not client.lost, num_stored))

        target = SimTarget(client, command.target, reserved, command.tenant)

    def _commit(self, command: CommitKv) -> None:
        def committed(ok: bool) -> None:
            self.runner.handle(KvCommitted(command.seq, command.first, command.last, ok))

        self._targets[command.seq].commit(command.first, command.last, committed)

    def _run_sequence(self, command: RunSequence) -> None:
        limits = self._config.limits
        self.engine.submit(
            command.seq,
            command.job,
            source_tokens=command.source_tokens,
            ssd_tokens=self._sources[command.seq].ssd_tokens if command.source_tokens else 0,
            one_token=command.one_token,
            store=command.store,
            stored_tokens=self._targets[command.seq].num_stored * limits.block_tokens if command.store else 0,
            turn=command.turn,
        )

    # ------------------------------------------------------------------ the engine's copies

    def load(self, command: LoadKv, done: Done) -> None:
        source = self._sources[command.seq]
        if self.on_load is not None and self.info.role is not Role.DECODE:
            self.on_load(self.engine.job(command.seq), command.end - command.start, source)
        source.copy(command.start, command.end, done)

    def store(self, command: StoreKv, done: Done) -> None:
        self._targets[command.seq].copy(command.start, command.end, done)

    def _progress(self, event: EngineProgress | KvStored, times: dict[tuple[int, int], Times]) -> None:
        self._times = times
        if self._observe is not None:
            self._observe(f"{self.name}.engine", self.engine.core, None, [])
        self.runner.handle(event)


def _partial_key(job: Job) -> bytes:
    key = job.key
    return partial_key(b"", key.frontend, key.request, key.choice, key.attempt)
