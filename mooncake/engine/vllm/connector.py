"""The KV connector that vLLM loads: `MooncakeKvConnector`, by kv_connector_module_path.

vLLM makes one object in its scheduler and one in each worker. This file turns its calls into ours, and decides nothing. It is
the only one that knows vLLM's connector interface, which differs between releases (`versions`).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from mooncake.core.errors import ConfigError, ModelError, StoreError
from mooncake.core.keys import object_key
from mooncake.engine.models import adapter_fingerprint, fingerprint, resolve_model
from mooncake.engine.vllm.guides import Guide, Guides
from mooncake.engine.vllm.layout import KvShape, geometry
from mooncake.engine.vllm.options import announce_layout, read_options, resolve
from mooncake.engine.vllm.pages import KvPages
from mooncake.engine.vllm.plans import StepPlans
from mooncake.engine.vllm.requests import FAULT, HandOver, KeyMaker, RequestKeys, response_params
from mooncake.engine.vllm.scheduler_side import Found, Scheduled, SchedulerSide
from mooncake.engine.vllm.versions import check_version
from mooncake.engine.vllm.worker_side import WorkerSide
from mooncake.status import die_with
from mooncake.store.api import Store

log = logging.getLogger(__name__)


class StepMetadata(KVConnectorMetadata):
    def __init__(self, plans: StepPlans) -> None:
        self.plans = plans


class FetchedMetadata(KVConnectorWorkerMetadata):
    """Of one worker, or of several together."""

    def __init__(self, fetched: tuple[tuple[int, int], ...]) -> None:
        self.fetched = fetched

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FetchedMetadata:
        assert isinstance(other, FetchedMetadata)
        return FetchedMetadata(self.fetched + other.fetched)


class MooncakeKvConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version(vllm.__version__)
        transfer = vllm_config.kv_transfer_config
        options = read_options(transfer.kv_connector_extra_config)
        self._place, block_tokens = resolve(options)
        self._shape = _kv_shape(vllm_config, kv_cache_config, block_tokens)
        self._geometry = geometry(self._shape.page_tokens, block_tokens)
        self._scheduler: _Scheduler | None = None
        self._worker: WorkerSide | None = None
        self._fetched: tuple[tuple[int, int], ...] = ()
        if role is KVConnectorRole.SCHEDULER:
            store = self._place.connect("vllm-scheduler")
            if options.in_service:
                # vLLM's handler of SIGTERM hangs if a second one interrupts it.
                die_with(os.getppid(), by=signal.SIGKILL)
            folder = resolve_model(vllm_config.model_config.model).path
            model = fingerprint(folder, _dtype_name(vllm_config))
            announce_layout(store, model, self._shape, replace=options.replace_layout)
            maker = KeyMaker(
                model,
                block_tokens,
                loads=True,
                saves=transfer.is_kv_producer,
                saves_tails=transfer.kv_role == "kv_producer",
                in_service=options.in_service,
            )
            overlap_max = options.overlap_bytes // self._shape.worker_token_bytes
            num_workers = self._shape.tp * self._shape.pp
            side = SchedulerSide(self._geometry, int(options.hand_over_s * 1e9), num_workers, overlap_max)
            guides = Guides(folder, vllm_config.model_config.get_vocab_size()) if options.in_service else None
            self._scheduler = _Scheduler(store, side, maker, self._shape, guides)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    # ------------------------------------------------------------------ in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        if not self._scheduler.has_guide(request):
            return None, False
        found = self._scheduler.match(request, num_computed_tokens)
        return found, found is not None and self._scheduler.side.is_ahead(found)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        [pages] = blocks.get_block_ids()
        self._scheduler.side.allocated(request.request_id, pages, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        assert self._scheduler is not None
        preempted = scheduler_output.preempted_req_ids or ()
        return StepMetadata(self._scheduler.side.plan_step(_scheduled(scheduler_output), sorted(preempted)))

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        metadata = connector_output.kv_connector_worker_meta
        if metadata is not None:
            assert isinstance(metadata, FetchedMetadata)
            self._scheduler.side.fetched(metadata.fetched)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # ------------------------------------------------------------------ in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pages = KvPages(kv_caches, self._shape)
        tp_rank, pp_rank = get_tp_group().rank_in_group, get_pp_group().rank_in_group
        store = self._place.connect(f"vllm-worker-{tp_rank}-{pp_rank}")
        self._worker = WorkerSide(store, pages, self._geometry, self._shape.shard(tp_rank, pp_rank))
        self._layers = pages.layers

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            self._worker.give_up(_plans(kv_connector_metadata).preempted)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step(_plans(connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads(_plans(self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(self._layers[layer_name])

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.layer_computed(self._layers[layer_name])

    def wait_for_save(self) -> None:
        """Does not wait for saves: pages are kept until the copies are done."""
        if self._worker is not None:
            self._worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        finished = self._worker.take_finished(finished_req_ids)
        self._fetched += finished.fetched
        return set(finished.saved), set(finished.loaded)

    def build_connector_worker_meta(self) -> FetchedMetadata | None:
        fetched, self._fetched = self._fetched, ()
        return FetchedMetadata(fetched) if fetched else None


_FIND_S = 1.0
"""How long vLLM's scheduler waits for the store, and with it all that run: not as long as the copying threads may."""
_REST_S = 5.0
"""How long a store that did not answer is not asked again."""


class _Scheduler:
    """SchedulerSide with a store, a clock and guides. guides: None if what vLLM makes of grammars is right as it is."""

    def __init__(
        self, store: Store, side: SchedulerSide, maker: KeyMaker, shape: KvShape, guides: Guides | None
    ) -> None:
        self.side = side
        self._store = store
        self._maker = maker
        self._shape = shape
        self._shards = shape.shards()
        self._guides = guides
        self._adapters: dict[str, str] = {}
        self._rests_until = 0.0
        store.deadline_s = min(store.deadline_s, _FIND_S)

    def has_guide(self, request: Any) -> bool:
        """Whether the request has the guide that it needs, if it needs one."""
        structured = request.structured_output_request
        if self._guides is None or structured is None or isinstance(structured.grammar, Guide):
            return True
        told = HandOver.of(request.kv_transfer_params)
        generated = request.prompt_token_ids[request.num_prompt_tokens - told.num_generated :]
        guide = self._guides.take(request.request_id, told.grammar, generated)
        if guide is not None:
            structured.grammar = guide
        return guide is not None

    def match(self, request: Any, num_local: int) -> int | None:
        name = request.request_id
        if self.side.keys(name) is None:
            keys = self._keys(request)
            if keys is None:
                return 0
            self.side.add(name, keys)
        keys = self.side.keys(name)
        assert keys is not None
        found = self._find(keys) if self.side.wants_to_know(name, num_local) else Found()
        return self.side.match(name, request.num_tokens, num_local, found, time.monotonic_ns())

    def finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        name = request.request_id
        if self._guides is None:
            keys = self.side.keys(name)
            params = None if keys is None else response_params(keys, self._shape.name)
        else:
            self._guides.forget(name)
            structured = request.structured_output_request
            guide = None if structured is None else structured.grammar
            params = {FAULT: guide.fault} if isinstance(guide, Guide) else None
        return self.side.finished(name), params

    def close(self) -> None:
        self._store.close()
        if self._guides is not None:
            self._guides.close()

    def _keys(self, request: Any) -> RequestKeys | None:
        """None for a request that has no tokens to name its KV by."""
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            return None
        extras = [f"{each.identifier}@{each.mm_position.offset}" for each in request.mm_features or ()]
        salt = request.cache_salt or ""
        params = request.kv_transfer_params
        try:
            lora = self._lora(request.lora_request)
            return self._maker.keys(request.prompt_token_ids, params, lora=lora, salt=salt, extras=extras)
        except (msgspec.ValidationError, ModelError) as error:
            log.warning("KV of %s stays here: %s", request.request_id, error)
            return None

    def _lora(self, lora: Any) -> str:
        if lora is None:
            return ""
        path = lora.lora_path
        if path not in self._adapters:
            self._adapters[path] = adapter_fingerprint(path)
        return self._adapters[path]

    def _find(self, keys: RequestKeys) -> Found:
        """A block is there if all workers' objects of it are."""
        wanted = (*keys.blocks, keys.tail) if keys.tail else keys.blocks
        if not wanted or time.monotonic() < self._rests_until:
            return Found()
        try:
            there = self._store.exists_batch([object_key(key, shard) for key in wanted for shard in self._shards])
        except StoreError as error:
            log.warning("the store cannot be asked: %s", error)
            self._rests_until = time.monotonic() + _REST_S
            return Found()
        num = len(self._shards)
        whole = [all(there[at * num : (at + 1) * num]) for at in range(len(wanted))]
        num_blocks = next((at for at, each in enumerate(whole) if not each), len(wanted))
        return Found(min(num_blocks, len(keys.blocks)), bool(keys.tail) and whole[-1])


def _plans(metadata: KVConnectorMetadata) -> StepPlans:
    assert isinstance(metadata, StepMetadata)
    return metadata.plans


def _scheduled(output: Any) -> Iterable[Scheduled]:
    for new in output.scheduled_new_reqs:
        num = output.num_scheduled_tokens[new.req_id]
        yield Scheduled(new.req_id, new.num_computed_tokens, num, new.block_ids[0], resumed=True)
    cached = output.scheduled_cached_reqs
    for at, request in enumerate(cached.req_ids):
        pages: Sequence[int] = cached.new_block_ids[at][0] if cached.new_block_ids[at] else ()
        num = output.num_scheduled_tokens[request]
        yield Scheduled(request, cached.num_computed_tokens[at], num, pages, request in cached.resumed_req_ids)


def _kv_shape(vllm_config: VllmConfig, kv_cache_config: Any, block_tokens: int) -> KvShape:
    """Raises ConfigError for what this connector cannot copy."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"kv_cache_groups = {len(groups)}: layers with KV of different kinds are not supported; "
            "start vLLM with --disable-hybrid-kv-cache-manager"
        )
    parallel = vllm_config.parallel_config
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ConfigError(f"{name} = {getattr(parallel, name)}: must be 1 with this connector")
    spec = groups[0].kv_cache_spec
    head_size = getattr(spec, "head_size", None)
    if head_size is None:
        raise ConfigError(f"kv_cache_spec = {type(spec).__name__}: only attention KV is supported")
    head_bytes = spec.page_size_bytes // spec.block_size // spec.num_kv_heads
    return KvShape(
        dtype=str(spec.dtype).removeprefix("torch."),
        kv_heads=spec.num_kv_heads,
        head_elements=head_bytes // spec.dtype.itemsize,
        page_tokens=spec.block_size,
        block_tokens=block_tokens,
        layers=vllm_config.model_config.get_total_num_hidden_layers(),
        token_bytes=spec.page_size_bytes // spec.block_size * parallel.tensor_parallel_size,
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
    )


def _dtype_name(vllm_config: VllmConfig) -> str:
    return str(vllm_config.model_config.dtype).removeprefix("torch.")


__all__ = ["MooncakeKvConnector", "StepMetadata"]
