"""Spans of requests, sent by the real exporter to a collector in this process."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from mooncake.core.clock import monotonic
from mooncake.core.errors import ConfigError
from mooncake.core.messages import Prediction
from mooncake.core.types import Slo
from mooncake.frontend.outcomes import Finished
from mooncake.frontend.params import read_headers, read_request_id
from mooncake.frontend.spans import CLOSE_S, EXPORT_S, NUM_WAITING_MAX, NoSpans, Spans, make_spans
from tests.frontend.collector import Collector, attributes

pytestmark = pytest.mark.quiet

MS = 1_000_000
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + EXPORT_S + 5
    while any(thread.name.startswith(("OtelBatch", "last-spans")) for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the exporter goes on after its end"
        time.sleep(0.02)


def finished(*offsets_ms: float | None, failure: str = "", traceparent: str = "", number: int = 7) -> Finished:
    """A request that was received a second ago, and came to its stages so long after."""
    received = monotonic() - 1000 * MS
    timeline = tuple(None if offset is None else received + int(offset * MS) for offset in offsets_ms)
    return Finished(
        number, "id-7", Slo(), timeline, received + 900 * MS, 40 * MS, 12 * MS, 30, 8, 5, 1, "prefill-0", "decode-0",
        Prediction(ttft_ns=35 * MS), failure, traceparent,
    )  # fmt: skip


def export(collector: Collector, count: int, *requests: Finished) -> list[Span]:
    spans = make_spans(collector.url, "frontend-0", "test", "tiny")
    for each in requests:
        spans.add(each)
    asyncio.run(spans.close())
    return collector.until(count)


def lengths_ms(spans: list[Span]) -> dict[str, float]:
    return {span.name: round((span.end_time_unix_nano - span.start_time_unix_nano) / MS, 3) for span in spans}


def test_a_request_is_a_span_with_one_below_it_for_each_part_of_its_way() -> None:
    with Collector() as collector:
        spans = export(collector, 7, finished(0, 1, 5, 40, 42, 50, 400))
    by_name = {span.name: span for span in spans}
    whole = by_name.pop("request")
    assert lengths_ms(spans) == {
        "request": 400, "place": 1, "wait for prefill": 4, "prefill": 35, "hand over": 2, "wait for decode": 8, "decode": 350,
    }  # fmt: skip
    assert {span.trace_id for span in spans} == {whole.trace_id} and whole.parent_span_id == b""
    assert {span.parent_span_id for span in by_name.values()} == {whole.span_id}
    assert whole.kind == Span.SPAN_KIND_SERVER and whole.status.code == Status.STATUS_CODE_UNSET
    assert abs(whole.start_time_unix_nano - (time.time_ns() - 1000 * MS)) < 30_000 * MS, "the time of day"
    assert by_name["place"].start_time_unix_nano == whole.start_time_unix_nano
    assert by_name["decode"].end_time_unix_nano == whole.end_time_unix_nano


def test_a_request_says_what_it_was_and_whose_process_served_it() -> None:
    with Collector() as collector:
        [span] = [
            span for span in export(collector, 2, finished(0, 1, None, None, None, None, 9)) if span.name == "request"
        ]
    assert attributes(span) == {
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 5,
        "mooncake.request": "frontend-0/7",
        "mooncake.request_id": "id-7",
        "mooncake.cached_tokens": 8,
        "mooncake.attempts": 1,
        "mooncake.prefill": "prefill-0",
        "mooncake.decode": "decode-0",
        "mooncake.predicted_ttft_ms": 35.0,
        "mooncake.ttft_ms": 40.0,
        "mooncake.tbt_ms": 12.0,
    }
    found = collector.resources[0]
    assert (found["service.name"], found["service.namespace"], found["service.instance.id"]) == (
        "mooncake",
        "test",
        "frontend-0",
    )


def test_a_failed_request_has_the_parts_that_it_came_through_and_its_reason() -> None:
    with Collector() as collector:
        spans = export(collector, 2, finished(0, 1, None, None, None, None, 30, failure="deadline"))
    assert lengths_ms(spans) == {"request": 30, "place": 1}
    [whole] = [span for span in spans if span.name == "request"]
    assert (whole.status.code, whole.status.message) == (Status.STATUS_CODE_ERROR, "deadline")


def test_a_stage_that_came_before_the_one_that_should_have_been_first_gives_an_empty_span() -> None:
    with Collector() as collector:
        spans = export(collector, 7, finished(0, 1, 5, 40, 38, 50, 400))
    assert lengths_ms(spans)["hand over"] == 0


@pytest.mark.parametrize(
    ("traceparent", "trace"),
    [(f"00-{TRACE}-{PARENT}-01", TRACE), ("", None), ("00-zz", None), (f"00-{'0' * 32}-{PARENT}-01", None)],
)
def test_the_clients_trace_goes_on_if_it_sent_one(traceparent: str, trace: str | None) -> None:
    headers = {b"traceparent": traceparent.encode()}
    request_id = read_request_id(headers, random.Random(1))
    directives = read_headers(request_id, headers, Slo())
    with Collector() as collector:
        spans = export(collector, 2, finished(0, 1, *[None] * 4, 9, traceparent=directives.traceparent))
    whole = next(span for span in spans if span.name == "request")
    if trace is None:
        assert whole.parent_span_id == b"" and whole.trace_id.hex() != TRACE
    else:
        assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (trace, PARENT)


def test_a_client_that_does_not_sample_its_trace_gets_no_spans() -> None:
    with Collector() as collector:
        spans = export(
            collector,
            2,
            finished(0, 1, *[None] * 4, 9, traceparent=f"00-{TRACE}-{PARENT}-00"),
            finished(0, 1, *[None] * 4, 9),
        )
    assert len(spans) == 2 and {span.trace_id.hex() for span in spans} != {TRACE}


def test_nobody_waits_for_a_collector_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    with Collector(delay_s=30) as collector:
        spans = Spans(collector.url, "frontend-0", "test", "tiny")
        count, began = 3 * NUM_WAITING_MAX // 7, time.monotonic()
        longest = 0.0
        for number in range(count):
            at = time.monotonic()
            spans.add(finished(0, 1, 5, 40, 42, 50, 400, number=number))
            longest = max(longest, time.monotonic() - at)
        spent = time.monotonic() - began
        assert collector.num_posts >= 1, "it was asked, and is silent"
        print(f"{spent / count * 1e6:.0f} us a request, the longest {longest * 1e3:.1f} ms")
        assert longest < 1.0 and spent < 20
        began = time.monotonic()
        asyncio.run(spans.close())
        assert time.monotonic() - began < CLOSE_S + 1


def test_nobody_waits_for_a_collector_that_is_not_there() -> None:
    with Collector() as collector:
        url = collector.url
    spans = Spans(url, "frontend-0", "test", "tiny")
    spans.add(finished(0, 1, 5, 40, 42, 50, 400))
    began = time.monotonic()
    asyncio.run(spans.close())
    assert time.monotonic() - began < CLOSE_S + 1


def test_without_an_endpoint_nothing_is_made_and_without_the_library_the_option_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(make_spans(None, "f", "c", "m"), NoSpans)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"OpenTelemetry is not installed; pip install 'mooncake-serving\[otel\]'"):
        make_spans("http://127.0.0.1:1/v1/traces", "f", "c", "m")
