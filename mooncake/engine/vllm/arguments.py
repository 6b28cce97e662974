"""From our configuration, and our jobs, to vLLM's. Of vLLM, only its configuration classes are imported, and late."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from mooncake.config import Config, RoleConfig
from mooncake.core.errors import ConfigError
from mooncake.core.types import Job, SamplingParams
from mooncake.engine.models import resolve_model
from mooncake.engine.vllm.books import bias_of, seed_of

_CPU_KV_TOKENS = 16_384
_CONNECTOR = "MooncakeKvConnector"
_MODULE = "mooncake.engine.vllm.connector"


def connector_options(config: Config, role: RoleConfig) -> dict[str, Any]:
    return {
        "config": os.path.join(config.run_dir, "config.json"),
        "store": [role.store],
        "block_tokens": config.block_tokens,
        "deadline_s": config.timeouts.rpc_s,
        "in_service": True,
    }


def engine_arguments(config: Config, role: RoleConfig, endpoints: Sequence[str]) -> Any:
    """A VllmConfig. endpoints: of KV events, and of their replay. Raises ConfigError."""
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    values: dict[str, Any] = {
        "model": str(resolve_model(config.model).path),
        "dtype": config.dtype,
        "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),
        "block_size": config.page_tokens,
        "max_model_len": config.max_context,
        "max_num_seqs": config.max_batch,
        "max_num_batched_tokens": max(config.max_step_tokens, config.max_batch),
        "scheduling_policy": "priority",
        "kv_transfer_config": _transfer(config, role),
        "kv_events_config": _events(endpoints),
    }
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        values |= {"enforce_eager": True, "distributed_executor_backend": "uni"}
    kv_tokens = config.kv_tokens or (_CPU_KV_TOKENS if on_cpu else None)
    if kv_tokens is not None:
        values["num_gpu_blocks_override"] = kv_tokens // config.page_tokens + 1  # vLLM keeps one
    try:
        found = AsyncEngineArgs(**(values | _extra(config))).create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses its configuration: {error}") from error
    if on_cpu and kv_tokens is not None:
        found.cache_config.kv_cache_memory_bytes = _kv_bytes(found, kv_tokens + config.page_tokens)
    return found


def _extra(config: Config) -> dict[str, Any]:
    try:
        found = json.loads(config.vllm_args or "{}")
    except ValueError as error:
        raise ConfigError(f"vllm_args = {config.vllm_args!r}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"vllm_args = {config.vllm_args!r}: must be a JSON object")
    return found


def _transfer(config: Config, role: RoleConfig) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=_CONNECTOR,
        kv_connector_module_path=_MODULE,
        kv_role="kv_both",
        kv_connector_extra_config=connector_options(config, role),
    )


def _events(endpoints: Sequence[str]) -> Any:
    from vllm.config import KVEventsConfig

    return KVEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", endpoint=endpoints[0], replay_endpoint=endpoints[1]
    )


def _kv_bytes(vllm_config: Any, num_tokens: int) -> int:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    head_bytes = 2 * model.get_head_size() * model.dtype.itemsize
    return int(num_tokens * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * head_bytes)


_ANY_TEXT = r"(?s:.*)"
"""What vLLM is told of a grammar, before a `Guide` takes its place."""


def sampling_params(job: Job | None, max_tokens: int, transfer: dict[str, Any]) -> Any:
    """Greedy without a job."""
    import vllm
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    wanted = SamplingParams(temperature=0.0) if job is None else job.sampling
    num_generated = 0 if job is None else job.num_generated
    return vllm.SamplingParams(
        n=1 if job is None or wanted.greedy else job.num_choices,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        seed=None if job is None or wanted.greedy else seed_of(job),
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        repetition_penalty=wanted.repetition_penalty,
        logit_bias=None if job is None else bias_of(job) or None,
        stop_token_ids=list(wanted.stop_token_ids),
        min_tokens=min(max_tokens, max(0, wanted.min_tokens - num_generated)),
        max_tokens=max_tokens,
        logprobs=wanted.num_logprobs,
        structured_outputs=StructuredOutputsParams(regex=_ANY_TEXT) if wanted.grammar else None,
        ignore_eos=True,  # stop_token_ids has what ends it
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": transfer},
    )
