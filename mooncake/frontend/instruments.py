"""The frontend's metrics. Counted per request and per batch of outputs, never per token."""

from __future__ import annotations

from collections.abc import Callable

from mooncake.frontend.backend import BackendStatus
from mooncake.metrics import Registry

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 10)
_REQUEST_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Instruments:
    def __init__(self, registry: Registry, status: Callable[[], BackendStatus]) -> None:
        self.num_running = 0
        name = "mooncake_frontend_"
        self.requests = registry.counter(
            name + "requests", "Requests by endpoint and HTTP status; 499: the client left first.", ("endpoint", "code")
        )
        self.prompt_tokens = registry.counter(name + "prompt_tokens", "Prompt tokens of requests with a first token.")
        self.cached_tokens = registry.counter(name + "cached_tokens", "Prompt tokens whose KV was reused.")
        self.output_tokens = registry.counter(name + "output_tokens", "Tokens generated.")
        self.dropped = registry.counter(name + "dropped_clients", "Clients disconnected because they did not read.")
        self.ttft = registry.histogram(name + "ttft_seconds", "From request start to first token.", _TTFT_S)
        self.itl = registry.histogram(name + "itl_seconds", "Gaps between successive tokens of a request.", _ITL_S)
        self.duration = registry.histogram(name + "request_seconds", "From request start to its end.", _REQUEST_S)
        registry.gauge(
            name + "requests_running", "Requests received and not yet ended.", (), lambda: {(): float(self.num_running)}
        )
        registry.gauge(name + "ready", "1 if requests can be served.", (), lambda: {(): 1.0 if status().ready else 0.0})
        registry.gauge(
            name + "instances",
            "Ready instances by role.",
            ("role",),
            lambda: {(role,): float(count) for role, count in status().instances.items()},
        )
