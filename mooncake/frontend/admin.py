"""The operator's endpoints: how the cluster is, why a request went where it went, and instances that take nothing new.

GET  /admin/status            an `Overview`
GET  /admin/explain?id=ID     by x-request-id, or as FRONTEND/NUMBER
POST /admin/drain/INSTANCE    and /admin/undrain/INSTANCE
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mooncake import __version__
from mooncake.core.clock import monotonic
from mooncake.core.messages import Told
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Stage
from mooncake.frontend.dispatch import DispatchBackend
from mooncake.frontend.errors import ApiError
from mooncake.frontend.guard import Guard
from mooncake.frontend.inquiries import Unanswered
from mooncake.frontend.outcomes import Finished
from mooncake.frontend.overview import Cluster, Overview

_STATUSES = {"unknown": 404, "unreachable": 409}
"""Of the words in `Told.error`."""
_NO_STORE = {"cache-control": "no-store"}
Handler = Callable[[Request], Awaitable[Any]]


class Admin:
    """cluster, frontend: their names."""

    def __init__(self, cluster: str, frontend: str, backend: DispatchBackend, guard: Guard) -> None:
        self._cluster = cluster
        self._frontend = frontend
        self._backend = backend
        self._guard = guard
        self._started_at = monotonic()

    def routes(self) -> list[Route]:
        return [
            Route("/admin/status", self._answer(self._status), methods=["GET"]),
            Route("/admin/explain", self._answer(self._explain), methods=["GET"]),
            Route("/admin/drain/{name}", self._answer(lambda request: self._hold(request, True)), methods=["POST"]),
            Route("/admin/undrain/{name}", self._answer(lambda request: self._hold(request, False)), methods=["POST"]),
        ]

    def _answer(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            self._guard.check(request)
            try:
                body = await handler(request)
            except Unanswered as error:
                raise ApiError(503, str(error), kind="server_error", code="unavailable", retry_after_s=1.0) from None
            return Response(msgspec.json.encode(body), headers=_NO_STORE, media_type="application/json")

        return answer

    # ------------------------------------------------------------ status

    async def _status(self, request: Request) -> Overview:
        backend, now = self._backend, monotonic()
        ready = backend.status()
        cluster, detail = None, ready.reason
        try:
            cluster = Cluster.of(await backend.inquiries.status())
        except Unanswered as error:
            detail = str(error)
        return Overview(
            version=__version__,
            name=self._cluster,
            frontend=self._frontend,
            model=backend.model.name,
            ready=ready.ready,
            detail=detail,
            uptime_s=round((now - self._started_at) / NANOS_PER_S, 1),
            num_running=backend.outcomes.num_running,
            requests=backend.outcomes.summary(now),
            cluster=cluster,
        )

    # ------------------------------------------------------------ explain

    async def _explain(self, request: Request) -> dict[str, Any]:
        name = request.query_params.get("id", "")
        if not name:
            raise ApiError(400, "id: an x-request-id, or FRONTEND/NUMBER, is needed", param="id")
        frontend, number = self._find(name)
        finished = self._backend.outcomes.finished(number) if frontend == self._frontend else None
        told = await self._backend.inquiries.explain(frontend, number)
        if told.error and finished is None:
            raise _refused(told, "id")
        text = told.text if finished is None else f"{_stages(finished)}\n\n{told.text}"
        return {"id": name, "request": f"{frontend}/{number}", "text": text}

    def _find(self, name: str) -> tuple[str, int]:
        number = self._backend.outcomes.number_of(name)
        if number is not None:
            return self._frontend, number
        match = re.fullmatch(r"([a-z0-9-]{1,64})/(\d{1,18})", name)
        if match is None:
            message = f"no request {name[:200]!r} is known here; the last ones of this frontend are, by x-request-id"
            raise ApiError(404, message, param="id", code="unknown")
        return match[1], int(match[2])

    # ------------------------------------------------------------ drain

    async def _hold(self, request: Request, held: bool) -> dict[str, str]:
        name = request.path_params["name"]
        told = await self._backend.inquiries.hold(name[:200], held)
        if told.error:
            raise _refused(told, "instance")
        return {"instance": name, "text": told.text}


def _refused(told: Told, param: str) -> ApiError:
    return ApiError(_STATUSES.get(told.error, 400), told.text, param=param, code=told.error)


def _stages(finished: Finished) -> str:
    """When each stage came, from the request's arrival on."""
    received = finished.timeline[Stage.RECEIVED] or 0
    passed = [
        f"{stage.name.lower().replace('_', ' ')} {(at - received) / NANOS_PER_MS:.1f}"
        for stage, at in zip(Stage, finished.timeline, strict=True)
        if at is not None
    ]
    outcome = finished.failure or "completed"
    counts = f"{finished.num_prompt} prompt tokens ({finished.num_cached} reused), {finished.num_output} output tokens"
    tries = f"{finished.num_attempts} attempt{'s' if finished.num_attempts != 1 else ''}"
    return f"{finished.request_id} {outcome}: {counts}, {tries}\n  stages, ms: {', '.join(passed)}"
