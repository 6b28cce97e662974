"""A frontend with its real dispatcher and a real Conductor core beside it, in one event loop; instances that give one token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from mooncake.core.clock import monotonic
from mooncake.core.messages import CONDUCTOR, AnyMessage, Register, StepTokens, Submit, TokenOutput
from mooncake.core.types import FinishReason, InstanceInfo, Role, Slo
from mooncake.frontend.admin import Admin
from mooncake.frontend.app import create_app
from mooncake.frontend.backend import ModelInfo
from mooncake.frontend.dashboard import dashboard_routes
from mooncake.frontend.dispatch import DispatchBackend
from mooncake.frontend.endpoint import Settings
from mooncake.frontend.guard import Guard
from mooncake.frontend.outcomes import Finished, Outcomes
from mooncake.frontend.server import HttpServer
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.rpc.driver import CoreDriver
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.core import ConductorCore, Received
from mooncake.scheduler.dispatcher import Dispatcher, DispatcherLimits, Tick, hashed_keys
from tests.scheduler.cluster import info

FRONTEND, TOKEN, BLOCK = "frontend-0", "the cluster's token", 4
SLO = Slo(ttft_ns=10**9)


class Cluster:
    """Conductor and instances, as far as the frontend sees them."""

    def __init__(self, model: ModelInfo) -> None:
        self.finished: list[Finished] = []
        self.core = ConductorCore(ConductorConfig(block_tokens=BLOCK), random.Random(7))
        self.silent = False
        """Whether the Conductor gives no answers to the operator, as one of an older version would."""
        outcomes = Outcomes(SLO, self.finished.append)
        self.backend = DispatchBackend(FRONTEND, model, BLOCK, 100, outcomes, timeout_s=0.3)
        dispatcher = Dispatcher(FRONTEND, DispatcherLimits(place_timeout_ns=10**8), hashed_keys(BLOCK))
        self.backend.driver = CoreDriver(dispatcher, self.backend.perform, Tick())
        self.backend.dialer = self
        self.backend.opened(CONDUCTOR, _Conductor(self))
        for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-10", Role.DECODE)):
            self.tell(name, Register(info(name, role)))

    def tell(self, sender: str, message: AnyMessage) -> None:
        """To the Conductor; what it sends to the frontend arrives there."""
        if self.silent and type(message).__name__.startswith("Ask"):
            return
        for send in self.core.handle(Received(sender, message), monotonic()):
            if send.to == FRONTEND:
                asyncio.get_running_loop().call_soon(self.backend.received, CONDUCTOR, [send.message])

    def connect(self, instance: InstanceInfo) -> None:
        self.backend.opened(instance.name, _Instance(self.backend, instance.name))

    def disconnect(self, peer: str) -> None:
        """Nobody is."""


class _Conductor:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def send(self, message: AnyMessage) -> None:
        self._cluster.tell(FRONTEND, message)


class _Instance:
    def __init__(self, backend: DispatchBackend, name: str) -> None:
        self._backend = backend
        self._name = name

    def send(self, message: AnyMessage) -> None:
        if isinstance(message, Submit):
            job = message.job
            output = TokenOutput(job.key, job.num_tokens, (65,), FinishReason.LENGTH, cached_tokens=0, compute_ns=1)
            answer = StepTokens(self._name, (output,))
            asyncio.get_running_loop().call_soon(self._backend.received, self._name, [answer])


class Site:
    def __init__(self, cluster: Cluster, server: HttpServer, client: httpx.AsyncClient) -> None:
        self.cluster, self.server, self.client = cluster, server, client

    async def complete(self, request_id: str) -> None:
        body = {"model": "tiny", "prompt": "hello, world", "max_tokens": 1}
        answer = await self.client.post("/v1/completions", json=body, headers={"x-request-id": request_id})
        assert answer.status_code == 200, answer.text

    async def json(self, method: str, path: str, status: int = 200, **headers: str) -> Any:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.client.request(method, path, headers=names)
        assert answer.status_code == status, answer.text
        return answer.json()


@asynccontextmanager
async def site(tokenizer: Tokenizer) -> AsyncIterator[Site]:
    model = ModelInfo("tiny", 4096, tokenizer.vocab_size, "fp_tiny", 1_700_000_000)
    cluster = Cluster(model)
    admin = Admin("test", FRONTEND, cluster.backend, Guard(TOKEN))
    routes = [*admin.routes(), *dashboard_routes()]
    app = create_app(cluster.backend, tokenizer, Settings(default_slo=SLO), rng=random.Random(1), more_routes=routes)
    server = HttpServer(app, "127.0.0.1", 0, grace_s=0.1)
    task = asyncio.create_task(server.run())
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
            yield Site(cluster, server, client)
    finally:
        server.stop()
        await asyncio.wait_for(task, 3)
        cluster.backend.driver.close()
