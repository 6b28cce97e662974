"""HTTP ports of our processes: taken before anything starts, served by uvicorn, which leaves signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from mooncake.core.errors import ConfigError
from mooncake.metrics import CONTENT_TYPE, Registry

BACKLOG = 2048
_END_S = 1.0
"""How long the end waits for scrapes under way."""


class QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, which has more to end than this server."""
        yield


def bind(host: str, port: int, *, send_buffer_bytes: int | None = None) -> socket.socket:
    """A socket that listens. Raises ConfigError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not a port: they are 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not an address of this machine: {error}") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if send_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)  # connections inherit it
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; choose another or stop what uses it") from None
        raise ConfigError(f"cannot listen on port {port} of {host}: {error}") from None
    return sock


def split_address(address: str) -> tuple[str, int]:
    """host:port, [host]:port. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"metrics = {address!r}: must be host:port")
    return host.strip("[]"), int(port)


@contextlib.asynccontextmanager
async def serving_metrics(registry: Registry, address: str) -> AsyncIterator[str]:
    """GET /metrics and /health at host:port meanwhile; with no address, nothing. Gives the address, port 0 replaced.

    Raises ConfigError if it cannot be had."""
    if not address:
        yield ""
        return
    host, port = split_address(address)
    sock = bind(host, port)
    server = QuietServer(
        uvicorn.Config(_metrics_app(registry), lifespan="off", ws="none", log_config=None, access_log=False)
    )
    server.config.timeout_graceful_shutdown = 1
    task = asyncio.create_task(server.serve([sock]))
    try:
        yield f"{host}:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        done, _ = await asyncio.wait({task}, timeout=_END_S)
        if not done:
            task.cancel()
            await asyncio.wait({task})


def _metrics_app(registry: Registry) -> Starlette:
    async def metrics(request: Request) -> Response:
        return Response(registry.render(), media_type=CONTENT_TYPE)

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    return Starlette(routes=[Route("/metrics", metrics), Route("/health", health)])
