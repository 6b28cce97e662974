"""The store node's process: a `StoreNode` whose reports go to the directory, which is embedded in the Conductor."""

from __future__ import annotations

import asyncio

import msgspec

from mooncake.config import Config, RoleConfig
from mooncake.core.errors import ConfigError, MooncakeError, StoreError
from mooncake.core.messages import AnyMessage, CacheDelta, CacheSnapshot, CopyBlocks, RegisterNode, SnapshotRequest
from mooncake.rpc.driver import open_event_log
from mooncake.rpc.stream import Hello, Link, RpcClient
from mooncake.status import Status
from mooncake.store.copier import Copier
from mooncake.store.node import NodeConfig, StoreNode
from mooncake.transport.tcp import parse_address


class StoreSettings(msgspec.Struct, frozen=True):
    """What a `StoreCore` is built from, as its event log keeps it."""

    capacity_bytes: int
    epoch: int
    alignment: int
    eviction: str = "lru"


async def run(config: Config, role: RoleConfig, status: Status) -> None:
    """Until cancelled."""
    status.loading(f"populating {config.store_memory >> 20} MiB of shared memory")
    reporter = _Reporter()
    node = StoreNode(_node_config(config, role), reporter.report)
    settings = StoreSettings(node.config.capacity_bytes, node.epoch, node.config.alignment, node.config.eviction)
    node.event_log = open_event_log(config, role, settings)
    try:
        await node.start()
    except StoreError as error:  # no room or no place to listen: a restart cannot mend it
        raise ConfigError(str(error)) from None
    reporter.node = node
    reporter.copier = Copier(node)
    hello = Hello(peer=role.name, kind=role.role, token=config.token, compat="")
    client = RpcClient(
        role.conductor,
        hello,
        tls=config.tls,
        on_open=reporter.opened,
        on_message=reporter.received,
        on_close=reporter.closed,
    )
    client.start()
    try:
        status.ready(f"{config.store_memory >> 20} MiB of DRAM")
        await asyncio.Event().wait()
    finally:
        await client.close()
        await reporter.copier.close()
        await node.close()
        if node.event_log is not None:
            node.event_log.close()


class _Reporter:
    """Passes the node's reports on while there is a connection; a new connection starts with a snapshot."""

    node: StoreNode
    copier: Copier

    def __init__(self) -> None:
        self._link: Link | None = None

    def report(self, message: CacheDelta | CacheSnapshot) -> None:
        if self._link is not None:
            self._link.send(message)

    def opened(self, link: Link) -> None:
        self._link = link
        link.send(RegisterNode(self.node.info))
        self.node.snapshot()

    def received(self, link: Link, messages: list[AnyMessage]) -> None:
        if any(isinstance(message, SnapshotRequest) for message in messages):
            self.node.snapshot()
        for message in messages:
            if isinstance(message, CopyBlocks):
                self.copier.wish(message)

    def closed(self, link: Link) -> None:
        if self._link is link:
            self._link = None


def _node_config(config: Config, role: RoleConfig) -> NodeConfig:
    """A node always has a Unix socket, for its own machine; one that listens on TCP serves others too."""
    if role.listen.startswith("unix:"):
        path = role.listen.removeprefix("unix:")
        return NodeConfig(
            config.cluster, role.name, config.store_memory, config.token, unix_path=path, eviction=config.eviction
        )
    try:
        _, target = parse_address(role.listen)
    except MooncakeError as error:
        raise ConfigError(f"listen = {role.listen!r}: {error}") from None
    assert isinstance(target, tuple)
    host, port = target
    return NodeConfig(
        config.cluster,
        role.name,
        config.store_memory,
        config.token,
        unix_path=f"{config.run_dir}/{role.name}.sock",
        tcp_host=host,
        tcp_port=port,
        advertised_host=host,
        eviction=config.eviction,
    )
