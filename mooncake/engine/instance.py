"""The process of one instance: build the engine, calibrate it, join the cluster, serve, drain.

`prefill.service` and `decode.service` differ in their cores and in the store commands that prefill adds. An instance that is
told to change its role drains, and goes on with the other's core, under a new epoch, on the engine and connections that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from mooncake.config import Config, RoleConfig, ServiceRole
from mooncake.core.errors import StoreError
from mooncake.core.messages import CONDUCTOR, Drain
from mooncake.core.types import CostModel, InstanceInfo, Job, KvSource, Role
from mooncake.engine.attempts import EngineProgress, KvStored, Received, TakeRole, Tick
from mooncake.engine.base import EngineLimits
from mooncake.engine.build import EngineParts, batch_max, build_engine
from mooncake.engine.instruments import instrument_instance
from mooncake.engine.shell import InstanceShell
from mooncake.metrics import Registry
from mooncake.rpc.driver import Core, CoreDriver, open_event_log
from mooncake.rpc.stream import Hello, RpcClient, RpcServer
from mooncake.status import Status
from mooncake.store.client import StoreClient

log = logging.getLogger(__name__)

_POLL_S = 0.02


class InstanceCore(Core, Protocol):
    @property
    def drained(self) -> bool: ...


MakeCore = Callable[[InstanceInfo, Callable[[Job], str | None], EngineLimits], tuple[InstanceCore, Any]]
"""From what the instance is, its engine's refusals and limits: the core, and the settings that head its event log."""
AddActions = Callable[[InstanceShell, StoreClient, EngineParts], None]


class RoleParts(msgspec.Struct, frozen=True):
    """What is different in a role."""

    make_core: MakeCore
    add_actions: AddActions


SERVICE_ROLES: dict[Role, ServiceRole] = {Role.PREFILL: "prefill", Role.DECODE: "decode"}


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
    config: Config, role: RoleConfig, status: Status, registry: Registry, roles: Mapping[Role, RoleParts]
) -> None:
    """Until cancelled; then drains within timeouts.drain_s. Raises MooncakeError if the engine or the store fails.

    roles: those that it can serve in. It begins in that of its configuration."""
    kind = Role(role.role)
    status.loading("the model")
    parts = await asyncio.to_thread(build_engine, config, role)
    status.loading("calibrating")
    cost = await asyncio.to_thread(parts.host.measure)
    gc.freeze()  # the model stays, and is no garbage at the end either: looking through it would outlast the drain
    status.loading("waiting for the store node")
    pool = StorePool(config, role)
    store = await pool.own(config.timeouts.start_s)
    instance = _Instance(config, role, roles, parts, cost, pool)
    for each in roles.values():
        each.add_actions(instance.shell, store, parts)
    instance.start(kind)
    instrument_instance(registry, parts.host, lambda: instance.kind)
    try:
        await instance.join()
        status.ready(f"{parts.host.limits.num_pages * config.page_tokens} tokens of KV")
        await instance.failed
    except asyncio.CancelledError:
        status.draining()
        await instance.drain(config.timeouts.drain_s)
        raise
    finally:
        await instance.close()
        await pool.close()


class _Instance:
    def __init__(
        self,
        config: Config,
        role: RoleConfig,
        roles: Mapping[Role, RoleParts],
        parts: EngineParts,
        cost: CostModel,
        pool: StorePool,
    ) -> None:
        self.shell = InstanceShell(pool.of, parts.shard, config.block_tokens)
        self.shell.add_action(TakeRole, lambda command: self.shell.spawn(self._take_role(command.role)))
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._config = config
        self._role = role
        self._roles = roles
        self._parts = parts
        self._cost = cost
        self._links: list[RpcServer | RpcClient] = []
        self._stopping = False

    def start(self, kind: Role) -> None:
        self.kind = kind
        loop = asyncio.get_running_loop()

        def failed(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._engine_failed, error)

        def progress(event: EngineProgress | KvStored) -> None:
            self.shell.driver.handle_soon(event)

        self.shell.engine = self._parts.host.start(kind, self._limits(kind), progress, failed)
        self.shell.drive(self._make_driver(kind))

    async def _take_role(self, kind: Role) -> None:
        """The core is drained. Until the engine is in the other role as well, it goes on refusing."""
        loop, replaced = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(replaced.set)

        self._parts.host.take_role(kind, self._limits(kind), tell)
        await replaced.wait()
        if self._stopping:
            return
        log.info("goes on as a %s instance", kind)
        self.kind = kind
        self.shell.driver.close()
        self.shell.drive(self._make_driver(kind))

    def _limits(self, kind: Role) -> EngineLimits:
        return msgspec.structs.replace(self._parts.host.limits, max_batch=batch_max(self._config, kind))

    def _make_driver(self, kind: Role) -> CoreDriver:
        """Of a new core with an epoch of its own. The engine comes first, as the core asks it what it would refuse."""
        limits = self._limits(kind)
        info = _info(self._role, kind, self._parts, limits, self._cost)
        self._core, settings = self._roles[kind].make_core(info, self._parts.host.refusal, limits)
        role = msgspec.structs.replace(self._role, role=SERVICE_ROLES[kind])
        event_log = open_event_log(self._config, role, settings)
        return CoreDriver(self._core, self.shell.perform, Tick(), log=event_log)

    async def join(self) -> None:
        hello = Hello(peer=self._role.name, kind=self._role.role, token=self._config.token, compat=self._parts.compat)
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
        self._stopping = True
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


def _info(role: RoleConfig, kind: Role, parts: EngineParts, limits: EngineLimits, cost: CostModel) -> InstanceInfo:
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
        shard=parts.shard,
        kv_token_bytes=parts.host.layout.object_bytes(1),
    )
