"""From configuration to a loaded model, and what the rest of the cluster must know of it."""

from __future__ import annotations

import msgspec

from mooncake.config import Config, RoleConfig, threads_per_instance
from mooncake.core.errors import ConfigError
from mooncake.core.keys import shard_id
from mooncake.core.types import Role
from mooncake.engine.base import EngineLimits, KvLayout, StepEngine
from mooncake.engine.host import EngineHost
from mooncake.engine.models import fingerprint, resolve_model
from mooncake.engine.stepped import SteppedHost

PROTOCOL_MAJOR = 1
PREFILL_BATCH_MAX = 8
"""Sequences that a prefill instance works on at once: its steps are bounded by tokens, not by sequences."""


def model_fingerprint(config: Config) -> str:
    """What the instances' engines will say; needs no engine. Raises ModelError."""
    if config.engine == "simulated":
        return f"simulated:{config.model_name or config.model}"
    return fingerprint(resolve_model(config.model).path, config.dtype)


class EngineParts(msgspec.Struct, frozen=True):
    """host: not yet calibrated. compat: exchanged at registration; unequal ones never share KV."""

    host: EngineHost
    fingerprint: str
    shard: bytes
    compat: str


def batch_max(config: Config, role: Role) -> int:
    return PREFILL_BATCH_MAX if role is Role.PREFILL else config.max_batch


def build_engine(config: Config, role: RoleConfig) -> EngineParts:
    """Loads the model: seconds to minutes, so call it in a thread. What it loads can serve in any role; only
    limits.max_batch is this one's. Raises ModelError, ConfigError or ProcessError."""
    found = model_fingerprint(config)
    if config.engine == "vllm":
        return _vllm_parts(config, role, found)
    step_engine = _step_engine(config, batch_max(config, Role(role.role)))
    layout = step_engine.layout
    compat = compat_hash(found, config.block_tokens, layout)
    return EngineParts(SteppedHost(step_engine), found, shard_id(layout.dtype, layout.name), compat)


def _vllm_parts(config: Config, role: RoleConfig, found: str) -> EngineParts:
    try:
        from mooncake.engine.vllm.engine import build_vllm

        host = build_vllm(config, role, found)
    except ImportError as error:
        raise ConfigError(f"engine = vllm: {error}; engine_python names the Python of vLLM's environment") from error
    return EngineParts(host, found, host.shard, compat_hash(found, config.block_tokens, host.layout))


def _step_engine(config: Config, max_batch: int) -> StepEngine:
    if config.engine == "simulated":
        from mooncake.engine.simulated import build_simulated

        return build_simulated(config, max_batch)
    from mooncake.engine.torch.build import build_torch

    return build_torch(config, max_batch, threads_per_instance(config))


def compat_hash(model: str, block_tokens: int, layout: KvLayout) -> str:
    """Readable on purpose: a mismatch is reported with both values."""
    return f"{model}/{block_tokens}/{layout.num_layers}x{layout.token_bytes}/{layout.name}/{layout.dtype}/v{PROTOCOL_MAJOR}"


def engine_limits(config: Config, max_batch: int, model_context: int, default_kv_tokens: int) -> EngineLimits:
    """What an engine of this configuration may hold and run. model_context: the model's own limit, tokens."""
    kv_tokens = config.kv_tokens or default_kv_tokens
    blocks = kv_tokens // config.block_tokens
    return EngineLimits(
        num_pages=blocks * (config.block_tokens // config.page_tokens),
        page_tokens=config.page_tokens,
        block_tokens=config.block_tokens,
        max_batch=max_batch,
        max_step_tokens=max(config.max_step_tokens, config.block_tokens),
        max_context=min(config.max_context or model_context, model_context),
    )
