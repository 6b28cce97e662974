"""The frontend's process: the HTTP application over a `DispatchBackend` with links to the Conductor and the instances."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

from mooncake.config import Config, RoleConfig, parse_origins
from mooncake.core.messages import CONDUCTOR
from mooncake.core.types import NANOS_PER_S, InstanceInfo, Slo
from mooncake.engine.build import model_fingerprint
from mooncake.engine.grammar import Grammars
from mooncake.engine.models import model_config, resolve_model
from mooncake.frontend.admin import Admin
from mooncake.frontend.app import create_app
from mooncake.frontend.backend import ModelInfo
from mooncake.frontend.dashboard import dashboard_routes
from mooncake.frontend.dispatch import DispatchBackend
from mooncake.frontend.endpoint import Settings
from mooncake.frontend.guard import Guard
from mooncake.frontend.keyring import Keyring
from mooncake.frontend.outcomes import Outcomes
from mooncake.frontend.server import HttpServer
from mooncake.frontend.spans import make_spans
from mooncake.frontend.tenants import Door, KeyedDoor, OpenDoor
from mooncake.frontend.tokenizer import Tokenizer
from mooncake.metrics import Registry
from mooncake.rpc.driver import CoreDriver, open_event_log
from mooncake.rpc.stream import Hello, Link, RpcClient
from mooncake.scheduler.dispatcher import Dispatcher, DispatcherLimits, DispatcherSettings, Tick, hashed_keys
from mooncake.status import Status

_READY_POLL_S = 0.02


async def run(config: Config, role: RoleConfig, status: Status, registry: Registry) -> None:
    """Until cancelled."""
    status.loading("the tokenizer")
    resolved = resolve_model(config.model)
    tokenizer = Tokenizer.load(resolved.path)
    settings = _settings(config)
    model = _model_info(config, resolved.path, config.model_name or resolved.name, tokenizer)
    spans = make_spans(config.otlp_endpoint, role.name, config.cluster, model.name)
    backend = _make_backend(config, role, model, Outcomes(settings.default_slo, spans.add))
    backend.dialer = dialer = InstanceDialer(config, role, backend)
    grammars = None if config.engine == "simulated" else Grammars.load(resolved.path)
    door, guard = _door_and_guard(config)
    admin = Admin(config.cluster, role.name, backend, guard)
    app = create_app(
        backend,
        tokenizer,
        settings,
        registry=registry,
        rng=random.Random(),
        door=door,
        grammars=grammars,
        origins=parse_origins(config.cors_origins),
        more_routes=[*admin.routes(), *dashboard_routes()],
    )
    server = HttpServer(app, config.host, config.port, tls=config.tls, grace_s=config.timeouts.drain_s)
    dialer.dial(CONDUCTOR, role.conductor)
    serving = asyncio.create_task(server.run())
    try:
        status.loading("waiting for instances")
        while not backend.status().ready:
            await asyncio.wait({serving}, timeout=_READY_POLL_S)
            if serving.done():
                break
        status.ready(server.url)
        await asyncio.shield(serving)
    finally:
        status.draining()
        server.stop()
        await serving
        await dialer.close()
        backend.driver.close()
        await spans.close()


def _make_backend(config: Config, role: RoleConfig, model: ModelInfo, outcomes: Outcomes) -> DispatchBackend:
    limits = DispatcherLimits(
        max_requests=config.limits.requests, place_timeout_ns=int(config.timeouts.placement_s * NANOS_PER_S)
    )
    dispatcher = Dispatcher(role.name, limits, hashed_keys(config.block_tokens))
    event_log = open_event_log(config, role, DispatcherSettings(role.name, limits, config.block_tokens))
    first_number = time.time_ns() // 1000
    backend = DispatchBackend(
        role.name, model, config.block_tokens, first_number, outcomes, timeout_s=config.timeouts.rpc_s
    )
    backend.driver = CoreDriver(dispatcher, backend.perform, Tick(), log=event_log)
    return backend


def _model_info(config: Config, path: Path, name: str, tokenizer: Tokenizer) -> ModelInfo:
    longest = model_config(path).get("max_position_embeddings", 1 << 20)
    longest = longest if isinstance(longest, int) else 1 << 20
    return ModelInfo(
        name=name,
        max_context=min(config.max_context or longest, longest),
        vocab_size=tokenizer.vocab_size,
        fingerprint=model_fingerprint(config),
        created=int((path / "config.json").stat().st_mtime),
    )


def _settings(config: Config) -> Settings:
    def nanoseconds(seconds: float | None) -> int | None:
        return None if seconds is None else int(seconds * NANOS_PER_S)

    return Settings(
        max_body_bytes=config.limits.body,
        max_running=config.limits.requests,
        request_timeout_s=config.timeouts.request_s,
        tool_parser=config.tool_parser,
        reasoning_parser=config.reasoning_parser,
        default_slo=Slo(nanoseconds(config.slo.ttft_s), nanoseconds(config.slo.tbt_s)),
    )


def _door_and_guard(config: Config) -> tuple[Door, Guard]:
    """Of users, and of operators."""
    if config.api_keys is None:
        return OpenDoor(), Guard(config.token)
    keyring = Keyring(Path(config.api_keys))

    def is_admin_key(text: str) -> bool:
        key = keyring.find(text, time.time())
        return key is not None and key.admin

    return KeyedDoor(keyring, config.limits.requests), Guard(config.token, is_admin_key)


class InstanceDialer:
    """Streams to the Conductor and to each instance, by name."""

    def __init__(self, config: Config, role: RoleConfig, backend: DispatchBackend) -> None:
        self._config = config
        self._hello = Hello(peer=role.name, kind=role.role, token=config.token)
        self._backend = backend
        self._clients: dict[str, RpcClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def connect(self, instance: InstanceInfo) -> None:
        self.dial(instance.name, instance.address)

    def disconnect(self, peer: str) -> None:
        client = self._clients.pop(peer, None)
        if client is not None:
            task = asyncio.create_task(client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def dial(self, peer: str, address: str) -> None:
        """Replaces an older connection to the same peer."""
        self.disconnect(peer)

        def opened(link: Link) -> None:
            self._backend.opened(peer, link)

        client = RpcClient(
            address,
            self._hello,
            tls=self._config.tls,
            on_open=opened,
            on_message=lambda link, messages: self._backend.received(peer, messages),
            on_close=lambda link: self._backend.closed(peer, link),
        )
        self._clients[peer] = client
        client.start()

    async def close(self) -> None:
        for peer in list(self._clients):
            self.disconnect(peer)
        await asyncio.gather(*self._closing, return_exceptions=True)
