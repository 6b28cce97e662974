"""uvicorn, made to fit: binds before anything starts, leaves signals alone, ends promptly, bounds a request's head."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mooncake.config import TlsConfig
from mooncake.core.errors import ConfigError
from mooncake.frontend.endpoint import ABORT_EXTENSION
from mooncake.frontend.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers; more ends the connection, so that no client can make us keep them."""
SEND_BUFFER_BYTES = 256 * 1024
"""The kernel's buffer per connection; left alone it grows to megabytes, which hide that a client does not read."""
_BACKLOG = 2048
_END_S = 1.0
"""How long cancelled requests may take to tell their clients."""


class _Protocol(HttpToolsProtocol):
    """Offers the application a way to drop the connection, and answers what is not HTTP in OpenAI's shape."""

    _head_bytes = 0
    _in_head = True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        extensions: dict[str, Any] = {ABORT_EXTENSION: self.transport.abort}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"the head of the request exceeds {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        body = ApiError(400, msg, code="invalid_http").body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[400] + head + body)
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, which has more to end than this server."""
        yield


class HttpServer:
    """Serves an application. The port is taken at construction; ConfigError if it cannot be.

    tls: with a certificate and its key the port speaks HTTPS. grace_s: how long running requests may go on after `stop`;
    then they are cancelled, and their clients told."""

    def __init__(self, app: Any, host: str, port: int, *, tls: TlsConfig | None = None, grace_s: float = 0.5) -> None:
        self._tls = tls or TlsConfig()
        _check_certificate(self._tls)
        self._socket = _bind(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        self._grace_s = grace_s
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            ssl_certfile=self._tls.cert,
            ssl_keyfile=self._tls.key,
        )
        self._server = _Server(config)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls.cert else 'http'}://{host}:{self.port}"

    async def run(self) -> None:
        """Returns after `stop`, or when cancelled."""
        self._server.config.timeout_graceful_shutdown = self._grace_s  # type: ignore[assignment]
        try:
            await self._server.serve([self._socket])
        finally:
            await self._end_requests()

    def stop(self) -> None:
        self._server.should_exit = True

    async def _end_requests(self) -> None:
        """uvicorn cancels what outlives the grace, but does not wait for it."""
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_END_S)
        for connection in list(self._server.server_state.connections):
            connection.transport.close()


async def serve(app: Any, host: str, port: int) -> None:
    """Serve until cancelled."""
    await HttpServer(app, host, port).run()


def _check_certificate(tls: TlsConfig) -> None:
    if tls.cert is None or tls.key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert, tls.key)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or str(error)
        raise ConfigError(f"tls.cert = {tls.cert!r}, tls.key = {tls.key!r}: {reason}") from None


def _bind(host: str, port: int) -> socket.socket:
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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # connections inherit it
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; choose another or stop what uses it") from None
        raise ConfigError(f"cannot listen on port {port} of {host}: {error}") from None
    return sock
