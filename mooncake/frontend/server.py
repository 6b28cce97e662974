"""The API's port: ends promptly, bounds a request's head, answers what is not HTTP in OpenAI's shape."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mooncake.config import TlsConfig
from mooncake.core.errors import ConfigError
from mooncake.frontend.connection import ABORT_EXTENSION
from mooncake.frontend.errors import ApiError
from mooncake.rpc.http import BACKLOG, QuietServer, bind

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers; more ends the connection, so that no client can make us keep them."""
SEND_BUFFER_BYTES = 256 * 1024
"""The kernel's buffer per connection; left alone it grows to megabytes, which hide that a client does not read."""
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
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        request_id = b"x-request-id: %b\r\n\r\n" % self.app.not_http(400).encode()
        self.transport.write(STATUS_LINE[400] + head + request_id + body)
        self.transport.close()


class HttpServer:
    """Serves an `App`. The port is taken at construction; ConfigError if it cannot be.

    tls: with a certificate and its key the port speaks HTTPS. grace_s: how long running requests may go on after `stop`;
    then they are cancelled, and their clients told."""

    def __init__(self, app: Any, host: str, port: int, *, tls: TlsConfig | None = None, grace_s: float = 0.5) -> None:
        self._tls = tls or TlsConfig()
        _check_certificate(self._tls)
        self._socket = bind(host, port, send_buffer_bytes=SEND_BUFFER_BYTES)
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
            backlog=BACKLOG,
            ssl_certfile=self._tls.cert,
            ssl_keyfile=self._tls.key,
        )
        self._server = QuietServer(config)

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
