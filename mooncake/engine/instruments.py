"""An instance's metrics: read when they are asked for, from what its engine counts anyway."""

from __future__ import annotations

from collections.abc import Callable

from mooncake.core.types import NANOS_PER_S
from mooncake.engine.stepped import SteppedEngine
from mooncake.metrics import Reading, Readings, Registry

_NAME = "mooncake_instance_"


def instrument_instance(registry: Registry, engine: Callable[[], SteppedEngine], role: Callable[[], str]) -> None:
    """engine: the one of now; role: likewise. Numbers are of all roles that the instance has had."""

    def load(name: str) -> Reading:
        return lambda: {(): getattr(engine().core.load, name)}

    def pages() -> Readings:
        now = engine().core
        return {("free",): now.load.free_pages, ("used",): now.limits.num_pages - now.load.free_pages}

    def kv_bytes() -> Readings:
        mover = engine().mover
        return {("load",): mover.bytes_loaded, ("store",): mover.bytes_stored}

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
    total(_NAME + "kv_bytes", "Bytes of KV copied between pages and the store.", ("direction",), kv_bytes)
    total(_NAME + "steps", "Steps of the engine.", (), lambda: {(): engine().num_steps})
    total(_NAME + "step_seconds", "Time spent in steps.", (), lambda: {(): engine().steps_ns / NANOS_PER_S})
