"""The store node's process: a `StoreNode` whose reports go to the directory, which is embedded in the Conductor."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from mooncake.config import Config, RoleConfig, parse_quotas
from mooncake.core.errors import ConfigError, MooncakeError, StoreError
from mooncake.core.keys import block_keys_of
from mooncake.core.messages import (
    AnyMessage,
    CacheDelta,
    CacheSnapshot,
    CopyBlocks,
    NodeLoad,
    RegisterNode,
    SnapshotRequest,
)
from mooncake.core.types import Tier, TierLoad
from mooncake.metrics import Registry
from mooncake.rpc.driver import open_event_log
from mooncake.rpc.stream import Hello, Link, RpcClient
from mooncake.status import Status
from mooncake.store.copier import Copier
from mooncake.store.directory.reporter import DirectoryReporter
from mooncake.store.events import NodeReport, Report, Snapshot, Usage
from mooncake.store.instruments import instrument_node
from mooncake.store.node import NodeConfig, StoreNode
from mooncake.store.ssd import SsdConfig
from mooncake.transport.tcp import parse_address

_LOAD_S = 1.0
"""How often the Conductor hears how full the tiers are, if that changed."""


class StoreSettings(msgspec.Struct, frozen=True):
    """What a `StoreCore` is built from, as its event log keeps it."""

    capacity_bytes: int
    epoch: int
    alignment: int
    ssd: SsdConfig = SsdConfig()
    eviction: str = "lru"
    quotas: dict[str, int] = {}


async def run(config: Config, role: RoleConfig, status: Status, registry: Registry) -> None:
    """Until cancelled."""
    status.loading(f"populating {config.store_memory >> 20} MiB of shared memory")
    reporter = _Reporter()
    node = StoreNode(_node_config(config, role), reporter.report)
    kept = node.config
    settings = StoreSettings(kept.capacity_bytes, node.epoch, kept.alignment, kept.ssd, kept.eviction, kept.quotas)
    node.event_log = open_event_log(config, role, settings)
    try:
        await node.start()
    except StoreError as error:  # no room or no place to listen: a restart cannot mend it
        raise ConfigError(str(error)) from None
    instrument_node(registry, node)
    reporter.node = node
    reporter.copier = Copier(node)
    client = _conductor_client(config, role, reporter) if role.conductor else None
    if role.directory:
        directory = DirectoryReporter(node, role.directory.split(","), reporter.copier.wish_objects)
        node.directory = reporter.directory = directory
    try:
        status.ready(_tiers(config, node))
        await reporter.report_loads()
    finally:
        if client is not None:
            await client.close()
        if reporter.directory is not None:
            await reporter.directory.close()
        await reporter.copier.close()
        await node.close()
        if node.event_log is not None:
            node.event_log.close()


def _conductor_client(config: Config, role: RoleConfig, reporter: _Reporter) -> RpcClient:
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
    return client


def _tiers(config: Config, node: StoreNode) -> str:
    metrics = node.core.metrics()
    text = f"{config.store_memory >> 20} MiB of DRAM with {metrics['objects']} objects"
    if config.store_ssd:
        text += f", {config.store_ssd >> 20} MiB of SSD with {metrics['ssd_recovered']}"
    return f"{text}, at {node.addresses[-1]}"


class _Reporter:
    """Passes the node's reports on, to the Conductor while there is a connection, which starts with a snapshot, and to the
    directory if there is one."""

    node: StoreNode
    copier: Copier

    def __init__(self) -> None:
        self.directory: DirectoryReporter | None = None
        self._link: Link | None = None
        self._told: NodeLoad | None = None

    def report(self, command: NodeReport) -> None:
        if self.directory is not None:
            self.directory.report(command)
        if self._link is not None and not isinstance(command, Usage):
            self._link.send(to_message(self.node.config.node, command))

    def opened(self, link: Link) -> None:
        self._link = link
        link.send(RegisterNode(self.node.info))
        self._told = None
        self.node.snapshot()

    def received(self, link: Link, messages: list[AnyMessage]) -> None:
        if any(isinstance(message, SnapshotRequest) for message in messages):
            self.node.snapshot()
        for message in messages:
            if isinstance(message, CopyBlocks):
                self.copier.wish_blocks(message)

    def closed(self, link: Link) -> None:
        if self._link is link:
            self._link = None

    async def report_loads(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_LOAD_S)
            load = node_load(self.node)
            if self._link is not None and load != self._told:
                self._told = load
                self._link.send(load)


def node_load(node: StoreNode) -> NodeLoad:
    now = node.metrics()
    prefixes = {Tier.DRAM: "", Tier.SSD: "ssd_"} if len(node.core.tiers) > 1 else {Tier.DRAM: ""}
    tiers = [
        TierLoad(tier, now[prefix + "capacity_bytes"], now[prefix + "used_bytes"], now[prefix + "objects"])
        for tier, prefix in prefixes.items()
    ]
    return NodeLoad(node.config.node, node.epoch, tuple(tiers))


def to_message(node: str, command: Report | Snapshot) -> CacheDelta | CacheSnapshot:
    """For the Conductor, who speaks of blocks: one node holds one shard of each."""
    if isinstance(command, Snapshot):
        return CacheSnapshot(node, command.epoch, command.seq, command.tier, block_keys_of(command.keys))
    added, removed = block_keys_of(command.added), block_keys_of(command.removed)
    return CacheDelta(node, command.epoch, command.seq, command.tier, added, removed)


def _node_config(config: Config, role: RoleConfig) -> NodeConfig:
    """A node always has a Unix socket, for its own machine; one that listens on TCP serves others too."""
    common: dict[str, Any] = {
        "cluster": config.cluster,
        "node": role.name,
        "capacity_bytes": config.store_memory,
        "token": config.token,
        "eviction": config.eviction,
        "ssd": SsdConfig(config.store_ssd or 0),
        "ssd_dir": config.store_ssd_dir or "",
        "quotas": parse_quotas(config.store_quotas),
    }
    if role.listen.startswith("unix:"):
        return NodeConfig(unix_path=role.listen.removeprefix("unix:"), **common)
    try:
        _, target = parse_address(role.listen)
    except MooncakeError as error:
        raise ConfigError(f"listen = {role.listen!r}: {error}") from None
    assert isinstance(target, tuple)
    host, port = target
    unix_path = f"{config.run_dir}/{role.name}.sock"
    return NodeConfig(unix_path=unix_path, tcp_host=host, tcp_port=port, advertised_host=host, **common)
