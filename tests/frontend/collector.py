"""A collector of spans in this process: takes OTLP over HTTP, as the real exporter sends it."""

from __future__ import annotations

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """A context manager. delay_s: how long each answer takes."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.num_posts = 0
        self.released = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.num_posts += 1
                collector.released.wait(delay_s)
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_request(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for each in request.resource_spans:
            self.resources.append(attributes(each.resource))
            for scope in each.scope_spans:
                self.spans.extend(scope.spans)

    def until(self, count: int, timeout_s: float = 10.0) -> list[Span]:
        deadline = time.monotonic() + timeout_s
        while len(self.spans) < count:
            assert time.monotonic() < deadline, f"{len(self.spans)} spans came, and not {count}"
            time.sleep(0.02)
        return list(self.spans)


def attributes(owner: Any) -> dict[str, Any]:
    """Of a span or a resource."""
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in owner.attributes}
