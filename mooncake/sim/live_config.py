"""The simulated cluster of a live configuration: what `mooncake serve --engine simulated` with these settings would be."""

from __future__ import annotations

from mooncake.config import Config
from mooncake.core.types import NANOS_PER_S
from mooncake.engine.build import PREFILL_BATCH_MAX, engine_limits
from mooncake.engine.simulated import DEFAULT_KV_TOKENS, HARDWARE, LAYOUT, MODEL_CONTEXT, scaled
from mooncake.scheduler.dispatcher import DispatcherLimits
from mooncake.scheduler.service import conductor_config
from mooncake.sim.cluster import ClusterConfig
from mooncake.sim.node import NodeConfig


def cluster_config(config: Config) -> ClusterConfig:
    """One machine: one store node and one frontend for all instances."""
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
        node=NodeConfig(
            capacity_bytes=config.store_memory, token_bytes=LAYOUT.object_bytes(1), block_tokens=limits.block_tokens
        ),
        conductor=conductor_config(config),
        dispatcher=DispatcherLimits(
            max_requests=config.limits.requests, place_timeout_ns=int(config.timeouts.placement_s * NANOS_PER_S)
        ),
    )
