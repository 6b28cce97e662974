"""Simulated clusters: that of a live configuration, and that of machines which one would have to buy first."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from mooncake.config import Config, parse_quotas
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.engine.build import PREFILL_BATCH_MAX, engine_limits
from mooncake.engine.simulated import DEFAULT_KV_TOKENS, HARDWARE, LAYOUT, MODEL_CONTEXT, scaled
from mooncake.scheduler.config import ConductorConfig, Rates
from mooncake.scheduler.dispatcher import DispatcherLimits
from mooncake.scheduler.service import conductor_config
from mooncake.sim.cluster import ClusterConfig
from mooncake.sim.hardware import Hardware, ModelShape, kv_tokens
from mooncake.sim.network import NetworkConfig
from mooncake.sim.node import NodeConfig
from mooncake.store.eviction import DEFAULT_POLICY

WHOLE_PROMPTS = 1 << 20
"""Tokens of a step that no prompt is chunked for."""
PAGE_TOKENS = 512
CHUNK_TOKENS = 8192
"""Of prefill instances: long enough to keep the GPUs busy."""


HOP_NS = NANOS_PER_MS
CALL_NS = 250_000
HOST_NS = 200_000
"""What live processes of one machine take for a message on a control stream, one way of a call to the store node, and between
two steps of an engine: see docs/measurements.md."""


def cluster_config(config: Config) -> ClusterConfig:
    """What `mooncake serve --engine simulated` with these settings would be. One machine: one store node and one frontend for
    all instances."""
    limits = engine_limits(config, config.max_batch, MODEL_CONTEXT, DEFAULT_KV_TOKENS)
    return ClusterConfig(
        prefill=config.prefill,
        decode=config.decode,
        nodes=1,
        block_tokens=limits.block_tokens,
        page_tokens=limits.page_tokens,
        num_pages=limits.num_pages,
        prefill_batch=PREFILL_BATCH_MAX,
        decode_batch=config.max_batch,
        max_step_tokens=limits.max_step_tokens,
        max_context=limits.max_context,
        cost=scaled(HARDWARE[config.simulated.hardware], config.simulated.speed),
        host_ns=HOST_NS,
        network=NetworkConfig(latency_ns=HOP_NS),
        node=NodeConfig(
            capacity_bytes=config.store_memory,
            eviction=config.eviction,
            quotas=parse_quotas(config.store_quotas),
            token_bytes=LAYOUT.object_bytes(1),
            block_tokens=limits.block_tokens,
            call_ns=CALL_NS,
            local_bytes_per_s=config.rates.dram_bytes_per_s,
            nic_bytes_per_s=config.rates.nic_bytes_per_s,
            ssd_bytes=config.store_ssd or 0,
            ssd_bytes_per_s=config.rates.ssd_bytes_per_s,
        ),
        conductor=conductor_config(config),
        dispatcher=DispatcherLimits(
            max_requests=config.limits.requests, place_timeout_ns=int(config.timeouts.placement_s * NANOS_PER_S)
        ),
    )


class Machines(msgspec.Struct, frozen=True):
    """Equal nodes with one instance each. None: what the hardware has; of max_step_tokens, chunks on prefill instances and
    whole prompts on colocated ones. assumed_nic_bytes_per_s: what the Conductor takes the network for, if not for what it is.
    conductor: settings of the Conductor that are not the default."""

    hardware: Hardware
    model: ModelShape
    prefill: int = 8
    decode: int = 8
    colocated: int = 0
    block_tokens: int = 512
    kv_tokens: int | None = None
    store_bytes: int | None = None
    eviction: str = DEFAULT_POLICY
    ssd_bytes: int = 0
    ssd_bytes_per_s: float | None = None
    nic_bytes_per_s: float | None = None
    assumed_nic_bytes_per_s: float | None = None
    max_batch: int = 256
    max_step_tokens: int | None = None
    conductor: dict[str, Any] = {}

    @property
    def page_tokens(self) -> int:
        return math.gcd(PAGE_TOKENS, self.block_tokens)


def machines_config(machines: Machines) -> ClusterConfig:
    """Raises msgspec.ValidationError for settings that the Conductor does not have."""
    hardware, model = machines.hardware, machines.model
    tokens = machines.kv_tokens or kv_tokens(hardware, model)
    nic = machines.nic_bytes_per_s or hardware.nic_bytes_per_s
    host = hardware.host_bytes_per_s
    assumed = machines.assumed_nic_bytes_per_s or nic
    ssd = machines.ssd_bytes_per_s or hardware.ssd_bytes_per_s
    rates = Rates(host, ssd, min(assumed, host), assumed)
    block_tokens = machines.block_tokens
    own = {"block_tokens": block_tokens, "kv_token_bytes": model.kv_token_bytes, "rates": msgspec.to_builtins(rates)}
    step = machines.max_step_tokens or (WHOLE_PROMPTS if machines.colocated else CHUNK_TOKENS)
    return ClusterConfig(
        prefill=machines.prefill,
        decode=machines.decode,
        colocated=machines.colocated,
        nodes=machines.prefill + machines.decode + machines.colocated,
        block_tokens=block_tokens,
        page_tokens=machines.page_tokens,
        num_pages=tokens // block_tokens * (block_tokens // machines.page_tokens),
        prefill_batch=PREFILL_BATCH_MAX,
        decode_batch=machines.max_batch,
        max_step_tokens=max(step, block_tokens),
        max_context=tokens,
        cost=hardware.cost,
        network=NetworkConfig(jitter_ns=0),
        node=NodeConfig(
            capacity_bytes=machines.store_bytes or hardware.dram_bytes,
            eviction=machines.eviction,
            token_bytes=model.kv_token_bytes,
            block_tokens=block_tokens,
            local_bytes_per_s=host,
            nic_bytes_per_s=nic,
            ssd_bytes=machines.ssd_bytes,
            ssd_bytes_per_s=ssd,
            checked=False,
        ),
        conductor=msgspec.convert(own | machines.conductor, ConductorConfig),
        dispatcher=DispatcherLimits(max_requests=1 << 20),
    )
