"""OpenTelemetry spans of requests that are over, made of their stage timeline: one for the request, and one below it for each
part of its way. They go out by a batch exporter on a thread of its own: if the collector is slow or away, the oldest that
wait are dropped, and no request waits.

Whoever sends a `traceparent` finds its request's span in its own trace.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

from mooncake import __version__
from mooncake.core.clock import monotonic
from mooncake.core.errors import ConfigError
from mooncake.core.types import NANOS_PER_MS, Stage
from mooncake.frontend.outcomes import Finished

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer
    from opentelemetry.util.types import AttributeValue

NUM_WAITING_MAX = 8192
"""Spans that wait to be sent: about seven of each request."""
NUM_BATCH_MAX = 512
BATCH_MS = 1000.0
"""A span goes out so long after its end, or with a full batch."""
EXPORT_S = 5.0
"""How long the collector may take for a batch, tries after a failure included."""
CLOSE_S = 2.0
"""How long the end waits for the last spans to go out."""

PARTS: tuple[tuple[str, Stage, Stage], ...] = (
    ("place", Stage.RECEIVED, Stage.PLACED),
    ("wait for prefill", Stage.PLACED, Stage.PREFILL_START),
    ("prefill", Stage.PREFILL_START, Stage.FIRST_TOKEN),
    ("hand over", Stage.FIRST_TOKEN, Stage.KV_READY),
    ("wait for decode", Stage.KV_READY, Stage.DECODE_START),
    ("decode", Stage.DECODE_START, Stage.END),
)
"""A part is left out if the request did not come to its end."""


class Spans:
    """Sends to that endpoint. Raises ConfigError if the library is missing."""

    def __init__(self, endpoint: str, frontend: str, cluster: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError(
                f"otlp_endpoint = {endpoint!r}: OpenTelemetry is not installed; pip install 'mooncake-serving[otel]'"
            ) from None
        resource = Resource.create(
            {
                "service.name": "mooncake",
                "service.namespace": cluster,
                "service.instance.id": frontend,
                "service.version": __version__,
            }
        )
        self._frontend = frontend
        self._model = model
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter: SpanExporter = OTLPSpanExporter(endpoint, timeout=EXPORT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=NUM_WAITING_MAX,
                schedule_delay_millis=BATCH_MS,
                max_export_batch_size=NUM_BATCH_MAX,
            )
        )
        self._tracer: Tracer = self._provider.get_tracer("mooncake", __version__)

    def add(self, finished: Finished) -> None:
        """Never waits."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        timeline, to_unix = finished.timeline, time.time_ns() - monotonic()
        received = timeline[Stage.RECEIVED]
        if received is None:
            return
        caller = TraceContextTextMapPropagator().extract({"traceparent": finished.traceparent})
        whole = self._tracer.start_span(
            "request",
            caller,
            SpanKind.SERVER,
            _attributes(finished, self._frontend, self._model),
            start_time=received + to_unix,
        )
        inside = set_span_in_context(whole)
        for name, begin, end in PARTS:
            began, ended = timeline[begin], timeline[end]
            if began is not None and ended is not None:
                part = self._tracer.start_span(name, inside, start_time=began + to_unix)
                part.end(max(began, ended) + to_unix)
        _set_status(whole, finished)
        whole.end((timeline[Stage.END] or finished.ended_at) + to_unix)

    async def close(self) -> None:
        """A thread of its own sends the last ones, as nothing may wait for a collector that does not answer. What it has not
        sent in time is given up."""
        thread = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        thread.start()
        deadline = time.monotonic() + CLOSE_S
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if thread.is_alive():
            self._exporter.shutdown()


class NoSpans:
    """They are not wanted."""

    def add(self, finished: Finished) -> None:
        pass

    async def close(self) -> None:
        pass


def make_spans(endpoint: str | None, frontend: str, cluster: str, model: str) -> Spans | NoSpans:
    return NoSpans() if endpoint is None else Spans(endpoint, frontend, cluster, model)


def _set_status(span: Span, finished: Finished) -> None:
    from opentelemetry.trace import Status, StatusCode

    if finished.failure:
        span.set_status(Status(StatusCode.ERROR, finished.failure))


def _attributes(finished: Finished, frontend: str, model: str) -> dict[str, AttributeValue]:
    """Times in milliseconds."""
    found: dict[str, AttributeValue] = {
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": finished.num_prompt,
        "gen_ai.usage.output_tokens": finished.num_output,
        "mooncake.request": f"{frontend}/{finished.number}",
        "mooncake.request_id": finished.request_id,
        "mooncake.cached_tokens": finished.num_cached,
        "mooncake.attempts": finished.num_attempts,
        "mooncake.prefill": finished.prefill,
        "mooncake.decode": finished.decode,
        "mooncake.predicted_ttft_ms": finished.prediction.ttft_ns / NANOS_PER_MS,
    }
    times = {"mooncake.ttft_ms": finished.ttft_ns, "mooncake.tbt_ms": finished.tbt_ns}
    return found | {name: ns / NANOS_PER_MS for name, ns in times.items() if ns is not None}
