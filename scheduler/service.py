"""The Conductor's process: `ConductorCore` behind a gRPC server. Turns messages into events; decides nothing."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from mooncake.config import Config, RoleConfig
from mooncake.core.messages import AnyMessage, Send
from mooncake.core.types import NANOS_PER_S
from mooncake.metrics import Registry
from mooncake.rpc.driver import CoreDriver, open_event_log
from mooncake.rpc.stream import Hello, Link, RpcServer
from mooncake.scheduler.config import ConductorConfig, Rates, RolesConfig
from mooncake.scheduler.core import ConductorCore, PeerGone, Received, Tick
from mooncake.scheduler.instruments import instrument_conductor
from mooncake.status import Status


async def run(config: Config, role: RoleConfig, status: Status, registry: Registry) -> None:
    """Until cancelled."""
    settings = conductor_config(config)
    service = _Service()
    core = ConductorCore(settings, random.Random(config.seed))
    instrument_conductor(registry, core)
    service.driver = CoreDriver(core, service.perform, Tick(), log=open_event_log(config, role, settings))
    hello = Hello(peer=role.name, kind=role.role, token=config.token, compat="")
    server = RpcServer(
        role.listen,
        hello,
        tls=config.tls,
        on_open=service.opened,
        on_message=service.received,
        on_close=service.closed,
    )
    await server.start()
    try:
        status.ready(f"policy {settings.policy}, admission {settings.admission} by {settings.admission_rule}")
        await asyncio.Event().wait()
    finally:
        await server.close()
        service.driver.close()


def conductor_config(config: Config) -> ConductorConfig:
    """The objectives of requests that name none are those that its pools are measured by."""
    roles = RolesConfig()
    if config.slo.ttft_s is not None:
        roles = msgspec.structs.replace(roles, ttft_ns=int(config.slo.ttft_s * NANOS_PER_S))
    if config.slo.tbt_s is not None:
        roles = msgspec.structs.replace(roles, tbt_ns=int(config.slo.tbt_s * NANOS_PER_S))
    return ConductorConfig(
        block_tokens=config.block_tokens,
        policy=config.policy,
        admission=config.admission,
        admission_rule=config.admission_rule,
        replicate=config.replicate == "on",
        switch_roles=config.switch_roles == "on",
        roles=roles,
        rates=Rates(
            dram_bytes_per_s=config.rates.dram_bytes_per_s,
            ssd_bytes_per_s=config.rates.ssd_bytes_per_s,
            remote_bytes_per_s=config.rates.remote_bytes_per_s,
            nic_bytes_per_s=config.rates.nic_bytes_per_s,
        ),
        wait_ns=int(config.timeouts.placement_s * 1e9),
        num_queued_max=config.limits.queue,
    )


class _Service:
    driver: CoreDriver

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}

    def opened(self, link: Link) -> None:
        self._links[link.peer] = link

    def closed(self, link: Link) -> None:
        """A link that was replaced by a newer one of the same peer is nobody's loss."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self.driver.handle(PeerGone(link.peer))

    def received(self, link: Link, messages: list[AnyMessage]) -> None:
        for message in messages:
            self.driver.handle(Received(link.peer, message))

    def perform(self, command: Any) -> None:
        assert isinstance(command, Send)
        link = self._links.get(command.to)
        if link is not None:
            link.send(command.message)
