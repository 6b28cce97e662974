"""The API's port: ends promptly, bounds a request's head, answers what is not HTTP in OpenAI's shape."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mooncake.config import TlsConfig
from mooncake.core.errors import ConfigError
from mooncake.frontend.connection import ABORT_EXTENSION
from mooncake.frontend.errors import ApiError
from mooncake.rpc.http import BACKLOG, QuietServer, bind

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers; more ends the connection, so that no client can make us keep them."""
HEAD_TIMEOUT_S = 75.0
"""From the beginning of a connection, or the end of an answer, to the end of the next head; the rest of a body that was not
wanted has to come meanwhile. Longer than clients and proxies keep connections that they do not use (up to 60 s): who ends one
just when the other sends makes an error of it."""
_LINGER_S = 1.0
"""How long a client that was refused may go on sending, which is not read."""
SEND_BUFFER_BYTES = 256 * 1024
"""The kernel's buffer per connection; left alone it grows to megabytes, which hide that a client does not read."""
_END_S = 1.0
"""How long cancelled requests may take to tell their clients."""


class _Protocol(HttpToolsProtocol):
    """Offers the application a way to drop the connection, and answers what is not HTTP in OpenAI's shape.

    One timer ends a connection that sends no request: it runs from its beginning, or the end of an answer, to the end of the
    next head. It also ends one that was answered an error, once it had time to read it."""

    _head_bytes = 0
    _in_head = True
    _refused = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end_in(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        extensions: dict[str, Any] = {ABORT_EXTENSION: self.transport.abort}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._wants_other_protocol():
            return  # to come again, by `_go_on`
        self._keep()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._wants_other_protocol():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else it is the next one's, which came meanwhile
            self._end_in(HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        was_in_head = self._in_head
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._wants_other_protocol():
                self._go_on(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("this is not a valid HTTP request")
        if was_in_head and self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"the head of the request exceeds {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """Closing while the client still sends would reset the connection, perhaps before it has read this."""
        if self._refused:
            return
        self._refused = True
        body = ApiError(400, msg, code="invalid_http").body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        request_id = b"x-request-id: %b\r\n\r\n" % self.app.not_http(400).encode()
        self.transport.write(STATUS_LINE[400] + head + request_id + body)
        if self.transport.can_write_eof() and self._timer is not None:  # else an answer is under way, and fails
            self.transport.write_eof()
            self._end_in(_LINGER_S)
        else:
            self.transport.close()

    def _wants_other_protocol(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _go_on(self, rest: bytes) -> None:
        """In HTTP/1.1, as a server may: the same head without its wish, behind which the parser takes nothing for HTTP. Java's
        client asks for HTTP/2 so with its first request."""
        method, url, headers = self.parser.get_method(), self.url, self.headers
        lines = [b"%b: %b\r\n" % (name, value) for name, value in headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, url, b"".join(lines), rest))

    def _end_in(self, seconds: float) -> None:
        self._keep()
        self._timer = self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        if self.transport.is_closing():  # and the client does not read what was sent before
            self.transport.abort()
            return
        self.transport.close()
        self._end_in(HEAD_TIMEOUT_S)

    def _keep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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
            timeout_keep_alive=int(HEAD_TIMEOUT_S),
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
