"""One long-lived bidirectional gRPC stream between two processes, and the messages on it.

The dialling side sends a Hello, the serving side checks it (token, protocol version, `admit`) and answers with its own; after
that both send envelopes, each with everything that waited. A broken stream is reported at once to both ends by `on_close`;
the dialling side tries again with growing pauses. A refused one is reported by `on_refused` and tried again rarely, since
whoever refused may be replaced.

Callbacks are plain functions on the event loop. `Link.send` never waits: what does not fit into the outbox breaks the link,
because a peer so far behind is as good as dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import msgspec

from mooncake.config import TlsConfig
from mooncake.core.errors import ConfigError, RpcError
from mooncake.core.messages import AnyMessage
from mooncake.rpc.codec import decode_envelope, encode_envelope
from mooncake.rpc.generated import mooncake_pb2 as pb

log = logging.getLogger(__name__)

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of a million tokens is 4 MB; a snapshot of a million block keys 16 MB."""
OUTBOX_MESSAGES = 65_536
HANDSHAKE_S = 5.0
BACKOFF_S = (0.02, 1.0)
REFUSED_S = 5.0
_METHOD = "/mooncake.v1.Peer/Stream"
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
)


class Refused(RpcError):
    """The serving side does not want this peer; the message says why and names both values."""


class Hello(msgspec.Struct, frozen=True):
    """Who a process is. token: the cluster's secret; compat: see `engine.build.compat_hash`, or empty."""

    peer: str
    kind: str
    token: str
    compat: str = ""


class _Stream(Protocol):
    """What grpc.aio's call (dialling side) and context (serving side) have in common."""

    def write(self, message: pb.Envelope) -> Awaitable[None]: ...

    def read(self) -> Awaitable[Any]: ...

    def cancel(self) -> Any: ...


class Link:
    """One end of an open stream. peer, kind, compat: of the other end."""

    def __init__(self, stream: _Stream, hello: pb.Hello) -> None:
        self.peer: str = hello.peer
        self.kind: str = hello.kind
        self.compat: str = hello.compat
        self.closed = False
        self._stream = stream
        self._outbox: list[AnyMessage] = []
        self._wake = asyncio.Event()

    def send(self, message: AnyMessage) -> None:
        """Queue for the next write. On a closed link this does nothing: `on_close` has been or will be called."""
        if self.closed:
            return
        if len(self._outbox) >= OUTBOX_MESSAGES:
            log.warning("%s does not read: %d messages wait; the link is closed", self.peer, len(self._outbox))
            self.close()
            return
        self._outbox.append(message)
        self._wake.set()

    def close(self) -> None:
        self.closed = True
        self._wake.set()
        self._stream.cancel()

    async def run(self, on_message: OnMessage) -> None:
        """Read and write until either ends. Never raises for a broken stream."""
        writer = asyncio.create_task(self._write())
        try:
            while True:
                envelope = await self._stream.read()
                if envelope is grpc.aio.EOF:
                    return
                on_message(self, decode_envelope(envelope))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            log.debug("link to %s ended: %s", self.peer, error)
        except RpcError as error:
            log.warning("link to %s: %s", self.peer, error)
        finally:
            self.closed = True
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self) -> None:
        while not self.closed:
            await self._wake.wait()
            self._wake.clear()
            messages, self._outbox = self._outbox, []
            if messages:
                await self._stream.write(encode_envelope(messages))


OnLink = Callable[[Link], None]
OnMessage = Callable[[Link, list[AnyMessage]], None]
Admit = Callable[[Hello], str | None]
"""Why a peer is not wanted, or None."""


def _admit_all(hello: Hello) -> str | None:
    return None


class RpcServer:
    """Serves one address: unix:/path or host:port (port 0: any; see `address` after start)."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        on_open: OnLink,
        on_message: OnMessage,
        on_close: OnLink,
        admit: Admit = _admit_all,
        tls: TlsConfig | None = None,
    ) -> None:
        self.address = address
        self._hello = hello
        self._on_open, self._on_message, self._on_close = on_open, on_message, on_close
        self._admit = admit
        self._tls = tls or TlsConfig()
        self._links: dict[str, Link] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises ConfigError naming the address if it cannot be had."""
        server = grpc.aio.server(options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve, request_deserializer=pb.Envelope.FromString, response_serializer=pb.Envelope.SerializeToString
        )
        service, method = _METHOD.strip("/").split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            port = self._bind(server)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen at {self.address}: {error}") from None
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await server.start()
        self._server = server

    def _bind(self, server: grpc.aio.Server) -> int:
        if self._tls.cert is None or self._tls.key is None or self.address.startswith("unix:"):
            return server.add_insecure_port(self.address)
        pair = (_read(self._tls.key), _read(self._tls.cert))
        ca = None if self._tls.ca is None else _read(self._tls.ca)
        credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
        return server.add_secure_port(self.address, credentials)

    async def close(self) -> None:
        for link in list(self._links.values()):
            link.close()
        if self._server is not None:
            await self._server.stop(grace=None)

    async def _serve(self, requests: AsyncIterator[pb.Envelope], context: Any) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                first = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello")
        refusal = self._refusal(first)
        if refusal is not None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        await context.write(_hello_envelope(self._hello))
        link = Link(_ServerStream(context), first.hello)
        older = self._links.get(link.peer)
        if older is not None:
            older.close()
        self._links[link.peer] = link
        self._on_open(link)
        try:
            await link.run(self._on_message)
        finally:
            link.closed = True
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            self._on_close(link)

    def _refusal(self, first: Any) -> str | None:
        if first is grpc.aio.EOF or not first.HasField("hello"):
            return "the first message must be a hello"
        hello = first.hello
        if not hmac.compare_digest(hello.token.encode(), self._hello.token.encode()):
            return "wrong cluster token"
        if hello.major != PROTOCOL_MAJOR or abs(hello.minor - PROTOCOL_MINOR) > 1:
            ours, theirs = f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}", f"{hello.major}.{hello.minor}"
            return f"protocol {theirs} of {hello.peer} does not fit {ours} of {self._hello.peer}"
        return self._admit(Hello(hello.peer, hello.kind, "", hello.compat))


class _ServerStream:
    """The serving side's context, with the dialling side's way to end the stream."""

    def __init__(self, context: Any) -> None:
        self.read = context.read
        self.write = context.write
        self._task = asyncio.current_task()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class RpcClient:
    """Keeps one stream to an address open. on_refused: told why, each time."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        on_open: OnLink,
        on_message: OnMessage,
        on_close: OnLink,
        on_refused: Callable[[str], None] = lambda why: log.warning("refused: %s", why),
        tls: TlsConfig | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._address = address
        self._hello = hello
        self._on_open, self._on_message, self._on_close = on_open, on_message, on_close
        self._on_refused = on_refused
        self._tls = tls or TlsConfig()
        self._rng = rng or random.Random(hello.peer)
        self._task: asyncio.Task[None] | None = None
        self._link: Link | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        delay_s, longest_s = BACKOFF_S
        while True:
            pause_s = delay_s * (0.5 + self._rng.random())
            try:
                await self._connect_once()
                delay_s = BACKOFF_S[0]
            except Refused as error:
                self._on_refused(str(error))
                pause_s = REFUSED_S
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
                log.debug("no link to %s: %s", self._address, error)
                delay_s = min(2 * delay_s, longest_s)
            await asyncio.sleep(pause_s)

    async def _connect_once(self) -> None:
        """One stream, from dial to end. Returns when an opened one ended; raises if none could be opened."""
        async with self._channel() as channel:
            call = channel.stream_stream(
                _METHOD, request_serializer=pb.Envelope.SerializeToString, response_deserializer=pb.Envelope.FromString
            )()
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await call.write(_hello_envelope(self._hello))
                    first = await call.read()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                raise await _reason(call, error) from None
            if not isinstance(first, pb.Envelope):
                raise await _reason(call, TimeoutError("the peer ended the stream"))
            link = Link(call, first.hello)
            self._on_open(link)
            try:
                await link.run(self._on_message)
            finally:
                link.closed = True
                call.cancel()
                self._on_close(link)

    def _channel(self) -> grpc.aio.Channel:
        if self._tls.ca is None or self._address.startswith("unix:"):
            return grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        pair = (None, None) if self._tls.key is None else (_read(self._tls.key), _read(self._tls.cert or ""))
        credentials = grpc.ssl_channel_credentials(_read(self._tls.ca), *pair)
        return grpc.aio.secure_channel(self._address, credentials, options=_OPTIONS)


async def _reason(call: Any, error: BaseException) -> BaseException:
    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
        async with asyncio.timeout(1.0):
            if await call.code() is grpc.StatusCode.PERMISSION_DENIED:
                return Refused(await call.details())
    return error


def _hello_envelope(hello: Hello) -> pb.Envelope:
    return pb.Envelope(
        hello=pb.Hello(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            peer=hello.peer,
            kind=hello.kind,
            token=hello.token,
            compat=hello.compat,
        )
    )


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: cannot read {path}: {error.strerror}") from None


__all__: Sequence[str] = ("Hello", "Link", "Refused", "RpcClient", "RpcServer")
