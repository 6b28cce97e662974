"""The process of one instance: build the engine, calibrate it, join the cluster, serve, drain.

`prefill.service` and `decode.service` differ in their cores and in the store commands that prefill adds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from mooncake.config import Config, RoleConfig
from mooncake.core.errors import StoreError
from mooncake.core.messages import CONDUCTOR, Drain
from mooncake.core.types import CostModel, InstanceInfo, Job, KvSource, Role
from mooncake.engine.attempts import EngineProgress, KvStored, Received, Tick
from mooncake.engine.base import StepEngine
from mooncake.engine.build import EngineParts, build_engine
from mooncake.engine.core import EngineCore
from mooncake.engine.shell import InstanceShell
from mooncake.engine.stepped import SteppedEngine
from mooncake.rpc.driver import Core, CoreDriver, open_event_log
from mooncake.rpc.stream import Hello, RpcClient, RpcServer
from mooncake.status import Status
from mooncake.store.client import StoreClient

log = logging.getLogger(__name__)

_POLL_S = 0.02


class InstanceCore(Core, Protocol):
    @property
    def drained(self) -> bool: ...


MakeCore = Callable[[InstanceInfo, Callable[[Job], str | None], EngineParts], tuple[InstanceCore, Any]]
"""From what the instance is, its engine's refusals and its parts: the core, and the settings that head its event log."""
AddActions = Callable[[InstanceShell, StoreClient, EngineParts], None]


class StorePool:
    """Clients of store nodes by name: our own, and those that a source named."""

    def __init__(self, config: Config, role: RoleConfig) -> None:
        self._config = config
        self._role = role
        self._clients: dict[str, StoreClient] = {}
        self._connecting = asyncio.Lock()

    async def own(self, start_s: float) -> StoreClient:
        """Our node's; waits for it to come up. Raises StoreError."""
        deadline = time.monotonic() + start_s
        while True:
            try:
                return await self._connect(self._role.node, (self._role.store,))
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_POLL_S)

    async def of(self, source: KvSource) -> StoreClient:
        return self._clients.get(source.node) or await self._connect(source.node, source.addresses)

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def _connect(self, node: str, addresses: tuple[str, ...]) -> StoreClient:
        async with self._connecting:
            if node not in self._clients:
                self._clients[node] = await StoreClient.connect(
                    addresses,
                    token=self._config.token,
                    name=self._role.name,
                    node=node,
                    deadline_s=self._config.timeouts.rpc_s,
                )
            return self._clients[node]


async def run_instance(
    config: Config, role: RoleConfig, status: Status, kind: Role, make_core: MakeCore, add_actions: AddActions
) -> None:
    """Until cancelled; then drains within timeouts.drain_s. Raises MooncakeError if the engine or the store fails."""
    status.loading("the model")
    parts = await asyncio.to_thread(build_engine, config, kind)
    status.loading("calibrating")
    cost = await asyncio.to_thread(parts.step_engine.measure)
    status.loading("waiting for the store node")
    pool = StorePool(config, role)
    store = await pool.own(config.timeouts.start_s)
    instance = _Instance(config, role, parts, pool)
    info = _info(config, role, kind, parts, cost)
    core, settings = make_core(info, instance.engine_core.refusal, parts)
    instance.start_engine(core, settings)
    add_actions(instance.shell, store, parts)
    try:
        await instance.join(parts.compat)
        status.ready(f"{parts.step_engine.limits.num_pages * config.page_tokens} tokens of KV")
        await instance.failed
    except asyncio.CancelledError:
        status.draining()
        await instance.drain(config.timeouts.drain_s)
        raise
    finally:
        await instance.close()
        await pool.close()


class _Instance:
    """engine_core exists first, as the core asks it what it would refuse."""

    def __init__(self, config: Config, role: RoleConfig, parts: EngineParts, pool: StorePool) -> None:
        limits = parts.step_engine.limits
        row_pages = max(1, limits.num_pages // limits.max_batch)
        overlap = role.role == "prefill"
        self.engine_core = EngineCore(limits, overlap_loads=overlap, row_pages=row_pages)
        self.shell = InstanceShell(pool.of, parts.shard, config.block_tokens)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._config = config
        self._role = role
        self._step_engine: StepEngine = parts.step_engine
        self._links: list[RpcServer | RpcClient] = []

    def start_engine(self, core: InstanceCore, settings: Any) -> None:
        self._core = core
        event_log = open_event_log(self._config, self._role, settings)
        self.shell.driver = CoreDriver(core, self.shell.perform, Tick(), log=event_log)
        loop = asyncio.get_running_loop()

        def failed(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._engine_failed, error)

        def progress(event: EngineProgress | KvStored) -> None:
            self.shell.driver.handle_soon(event)

        self.shell.engine = SteppedEngine(self.engine_core, self._step_engine, progress, failed)

    async def join(self, compat: str) -> None:
        hello = Hello(peer=self._role.name, kind=self._role.role, token=self._config.token, compat=compat)
        shell, tls = self.shell, self._config.tls
        server = RpcServer(
            self._role.listen,
            hello,
            tls=tls,
            on_open=shell.opened,
            on_message=shell.received,
            on_close=shell.closed,
        )
        await server.start()
        client = RpcClient(
            self._role.conductor,
            hello,
            tls=tls,
            on_open=shell.opened,
            on_message=shell.received,
            on_close=shell.closed,
        )
        client.start()
        self._links = [client, server]

    async def drain(self, bound_s: float) -> None:
        """Take nothing new and finish what runs, within the bound."""
        self.shell.driver.handle(Received(CONDUCTOR, Drain(self._role.name)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                while not self._core.drained:
                    await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        await self.shell.close()
        await asyncio.to_thread(self.shell.engine.close)
        self.shell.driver.close()

    def _engine_failed(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


def _info(config: Config, role: RoleConfig, kind: Role, parts: EngineParts, cost: CostModel) -> InstanceInfo:
    limits = parts.step_engine.limits
    return InstanceInfo(
        name=role.name,
        epoch=time.time_ns(),
        role=kind,
        address=role.listen,
        compat=parts.compat,
        node=role.node,
        node_addresses=(role.store,),
        num_pages=limits.num_pages,
        page_tokens=limits.page_tokens,
        max_batch=limits.max_batch,
        max_step_tokens=limits.max_step_tokens,
        cost=cost,
    )
