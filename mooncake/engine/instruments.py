"""An instance's metrics: read when they are asked for, from what its engine counts anyway."""

from __future__ import annotations

from collections.abc import Callable

from mooncake.core.types import NANOS_PER_S
from mooncake.engine.host import EngineCounts, EngineHost
from mooncake.metrics import Reading, Readings, Registry

_NAME = "mooncake_instance_"


def instrument_instance(registry: Registry, host: EngineHost, role: Callable[[], str]) -> None:
    """Of an engine that was started. role: the one that it serves in now; numbers are of all that it has had."""

    def load(name: str) -> Reading:
        return lambda: {(): getattr(host.counts().load, name)}

    def pages() -> Readings:
        free = host.counts().load.free_pages
        return {("free",): free, ("used",): host.limits.num_pages - free}

    def reused() -> Readings:
        found = host.counts().load.reused
        return {("hbm",): found.hbm, ("dram",): found.dram, ("ssd",): found.ssd}

    gauge, total = registry.gauge, registry.total
    gauge(_NAME + "role", "1 for the role that it serves in.", ("role",), lambda: {(role(),): 1})
    gauge(_NAME + "waiting", "Sequences that wait for pages or a place in the batch.", (), load("num_waiting"))
    gauge(_NAME + "waiting_tokens", "Tokens still to be computed by prefills.", (), load("waiting_tokens"))
    gauge(_NAME + "running", "Sequences in the batch.", (), load("num_running"))
    gauge(_NAME + "context_tokens", "Tokens of the sequences in the batch.", (), load("context_tokens"))
    gauge(_NAME + "pages", "KV pages; those of cached blocks that nobody uses are free.", ("state",), pages)
    total(_NAME + "preemptions", "Sequences put back for want of pages.", (), load("num_preempted"))
    total(_NAME + "computed_tokens", "Tokens whose KV was computed.", (), load("num_computed_tokens"))
    total(_NAME + "loaded_tokens", "Tokens whose KV was loaded.", (), load("num_loaded_tokens"))
    prompts = "Prompt tokens whose prefill is done."
    total(_NAME + "prompt_tokens", prompts, (), lambda: {(): host.counts().load.reused.prompt})
    total(
        _NAME + "reused_tokens", "Of these, those whose KV was reused, by the tier that it was in.", ("tier",), reused
    )
    _instrument_work(registry, host.counts)


def _instrument_work(registry: Registry, counts: Callable[[], EngineCounts]) -> None:
    """What engines that do not plan their steps and copies themselves do not know has no series."""

    def known(read: Callable[[EngineCounts], Readings]) -> Reading:
        def now() -> Readings:
            found = counts()
            return read(found) if found.num_steps is not None else {}

        return now

    def kv_bytes(now: EngineCounts) -> Readings:
        return {("load",): now.bytes_loaded, ("store",): now.bytes_stored}

    total = registry.total
    total(_NAME + "kv_bytes", "Bytes of KV copied between pages and the store.", ("direction",), known(kv_bytes))
    total(_NAME + "steps", "Steps of the engine.", (), known(lambda now: {(): now.num_steps or 0}))
    total(_NAME + "step_seconds", "Time spent in steps.", (), known(lambda now: {(): now.steps_ns / NANOS_PER_S}))
