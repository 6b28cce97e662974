"""One long-lived bidirectional gRPC stream between two processes, and the messages on it.

The dialling side sends a Hello, the serving side checks it (token, protocol version, `admit`) and answers with its own; after
that both send envelopes, each with everything that waited. A broken stream is reported at once to both ends by `on_close`;
the dialling side tries again with growing pauses. A refused one is reported by `on_refused` and tried again rarely, since
whoever refused may be replaced. A silent peer, be it frozen or behind a dead wire, is given up by both ends (SILENCE_S).

Callbacks are plain functions on the event loop. `Link.send` never waits: what does not fit into the outbox breaks the link,
because a peer so far behind is as good as dead. So does a message that cannot be sent, and a callback that fails: messages are
lost only together with their link, and the snapshots that follow a new one repair what was lost.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError

from mooncake.config import TlsConfig
from mooncake.core.errors import ConfigError, OutboxFull, ProtocolFault, Refused, RpcError
from mooncake.core.messages import (
    AnyMessage,
    AttemptEnded,
    BookingSnapshot,
    CacheDelta,
    HandoverDone,
    LiveAttempts,
    LoadReport,
    PrefillDone,
)
from mooncake.rpc.codec import decode_envelope, encode_envelope
from mooncake.rpc.generated import mooncake_pb2 as pb

log = logging.getLogger(__name__)

PROTOCOL_MAJOR = 1
PROTOCOL_MINOR = 0
MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of a million tokens is 4 MB; a snapshot of a million block keys 16 MB."""
OUTBOX_MESSAGES = 65_536
HANDSHAKE_S = 5.0
"""For connection and handshake together."""
PATIENCE_S = 0.02
_PATIENT = frozenset({AttemptEnded, BookingSnapshot, CacheDelta, HandoverDone, LiveAttempts, LoadReport, PrefillDone})
"""Messages that nobody waits for go with the next one that somebody does, or after PATIENCE_S: a write costs both ends about
100 us of CPU, whatever it carries."""
PACE_S = 0.002
"""Writes of one link are at least so far apart: on a quiet link nothing waits, on a busy one a write carries more."""
BEAT_S = 1.0
"""Who has said nothing for so long sends an empty envelope. gRPC's own keep-alive is no match: a serving end sends no pings
while its peer's transport answers for a process that does not run."""
SILENCE_S = 4.0
"""Who has not been heard for so long is as good as dead."""
BACKOFF_S = (0.02, 1.0)
REFUSED_S = 5.0
_EXPLAIN_S = 1.0
"""How long a failed write waits for the reader, which learns why the stream ended."""
_METHOD = "/mooncake.v1.Peer/Stream"
_BROKEN = (grpc.aio.AioRpcError, grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError)
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
)


class Hello(msgspec.Struct, frozen=True):
    """Who a process is. token: the cluster's secret; compat: see `engine.build.compat_hash`, or empty."""

    peer: str
    kind: str
    token: str
    compat: str = ""


class _Stream(Protocol):
    """What grpc.aio's call (dialling side) and context (serving side) have in common."""

    def write(self, message: bytes) -> Awaitable[None]: ...

    def read(self) -> Awaitable[Any]: ...


class Link:
    """One end of an open stream. peer, kind, compat: of the other end. error: why it ended, as far as this end knows."""

    def __init__(self, stream: _Stream, hello: pb.Hello) -> None:
        self.peer: str = hello.peer
        self.kind: str = hello.kind
        self.compat: str = hello.compat
        self.closed = False
        self.error: RpcError | None = None
        self._stream = stream
        self._outbox: list[AnyMessage] = []
        self._wake = asyncio.Event()
        self._patience_runs = False
        self._spoke = False
        """Whether anything was written since the last beat."""
        self._heard_at = 0.0
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    def send(self, message: AnyMessage) -> None:
        """Queue for the next write. On a closed link this does nothing: `on_close` has been or will be called."""
        if self.closed:
            return
        if len(self._outbox) >= OUTBOX_MESSAGES:
            self.close(OutboxFull(f"{self.peer} does not read: {len(self._outbox)} messages wait"))
            return
        self._outbox.append(message)
        if type(message) not in _PATIENT:
            self._wake.set()
        elif not self._patience_runs:
            self._patience_runs = True
            asyncio.get_running_loop().call_later(PATIENCE_S, self._wake.set)

    def close(self, error: RpcError | None = None) -> None:
        """What waits in the outbox is dropped; `on_close` follows. The dialling side connects anew."""
        if self.closed:
            return
        if error is not None:
            log.warning("link to %s is closed: %s", self.peer, error)
        self.closed = True
        self.error = error
        for task in self._tasks:
            task.cancel()

    async def attend(self, callbacks: Callbacks) -> None:
        """The open link's whole life. Raises neither for a broken stream nor for a failing callback."""
        try:
            callbacks.on_open(self)
            await self._run(callbacks.on_message)
        except RpcError as error:
            log.warning("link to %s: %s", self.peer, error)
            self.error = error
        except Exception as error:
            log.exception("link to %s: a callback failed", self.peer)
            self.error = RpcError(f"the receiver failed: {type(error).__name__}")
        finally:
            self.closed = True
            callbacks.on_close(self)

    async def _run(self, on_message: OnMessage) -> None:
        """Read, write and beat until one ends. They are tasks of their own, so that `close` ends them and nobody else."""
        if self.closed:
            return
        parts = (self._read(on_message), self._write(), self._beat())
        self._tasks = tuple(asyncio.create_task(part) for part in parts)
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.closed = True
            for task in self._tasks:
                task.cancel()
            results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and self.error is None:
                _raise_meaning(result)

    async def _read(self, on_message: OnMessage) -> None:
        clock = asyncio.get_running_loop().time
        while (data := await self._stream.read()) is not grpc.aio.EOF:
            self._heard_at = clock()
            if data:
                on_message(self, decode_envelope(data))

    async def _beat(self) -> None:
        clock = asyncio.get_running_loop().time
        beat_at = self._heard_at = clock()
        while True:
            await asyncio.sleep(BEAT_S)
            now = clock()
            if now - beat_at > 2 * BEAT_S:  # this process did not run: what the peer said meanwhile is still to be read
                self._heard_at = now
            beat_at = now
            if now - self._heard_at > SILENCE_S:
                raise RpcError(f"nothing was heard from it for {SILENCE_S:g} s")
            if not self._spoke:
                self._wake.set()
            self._spoke = False

    async def _write(self) -> None:
        clock = asyncio.get_running_loop().time
        next_at = 0.0
        while True:
            await self._wake.wait()
            pause_s = next_at - clock()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            next_at = clock() + PACE_S
            self._wake.clear()
            self._patience_runs = False
            messages, self._outbox = self._outbox, []
            if not messages and self._spoke:
                continue
            self._spoke = True
            try:
                for data in encode_envelope(messages, MAX_MESSAGE_BYTES):
                    await self._stream.write(data)
            except _BROKEN:
                await asyncio.sleep(_EXPLAIN_S)
                raise


OnLink = Callable[[Link], None]
OnMessage = Callable[[Link, list[AnyMessage]], None]


class Callbacks(NamedTuple):
    """on_close is called once for each link, also where on_open failed."""

    on_open: OnLink
    on_message: OnMessage
    on_close: OnLink


Admit = Callable[[Hello], str | None]
"""Why a peer is not wanted, or None. The text names both values."""


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
        self._callbacks = Callbacks(on_open, on_message, on_close)
        self._admit = admit
        self._tls = tls or TlsConfig()
        self._links: dict[str, Link] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises ConfigError naming the address if it cannot be had."""
        server = grpc.aio.server(options=_OPTIONS)
        handler: Any = grpc.stream_stream_rpc_method_handler(self._serve)
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
        pem = _load_pem(self._tls, self.address)
        if pem is None:
            return server.add_insecure_port(self.address)
        credentials = grpc.ssl_server_credentials([(pem.key, pem.cert)], pem.ca, require_client_auth=pem.ca is not None)
        return server.add_secure_port(self.address, credentials)

    async def close(self) -> None:
        """When it returns, `on_close` has been called for every link."""
        if self._server is not None:
            await self._server.stop(grace=None)
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> None:
        link = Link(context, await self._greet(context))
        older = self._links.get(link.peer)
        if older is not None:
            older.close(Refused(f"replaced by a newer connection of the same name, {link.peer}"))
        self._links[link.peer] = link
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            await link.attend(self._callbacks)
        finally:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
        if link.error is not None:
            code = grpc.StatusCode.PERMISSION_DENIED if isinstance(link.error, Refused) else grpc.StatusCode.ABORTED
            await context.abort(code, str(link.error))

    async def _greet(self, context: Any) -> pb.Hello:
        """The serving side's handshake. A peer that is not wanted is told why."""
        hello = pb.Hello()
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                hello = _hello_of(await context.read())
                self._check(hello)
                await context.write(_hello_envelope(self._hello, token=""))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello in time")
        except RpcError as error:
            log.warning("%s is refused: %s", hello.peer or "a peer", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        return hello

    def _check(self, hello: pb.Hello) -> None:
        """The token comes first: who does not know it learns nothing else."""
        if not hmac.compare_digest(hello.token.encode(), self._hello.token.encode()):
            raise Refused("wrong cluster token")
        _check_version(hello, self._hello)
        refusal = self._admit(Hello(hello.peer, hello.kind, "", hello.compat))
        if refusal is not None:
            raise Refused(refusal)


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
        on_refused: Callable[[Refused], None] = lambda why: log.warning("refused: %s", why),
        tls: TlsConfig | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._address = address
        self._hello = hello
        self._callbacks = Callbacks(on_open, on_message, on_close)
        self._on_refused = on_refused
        self._tls = tls or TlsConfig()
        self._rng = rng or random.Random(hello.peer)
        self._credentials: grpc.ChannelCredentials | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Raises ConfigError if a file of `tls` cannot be read."""
        pem = _load_pem(self._tls, self._address)
        if pem is not None:
            self._credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """When it returns, `on_close` has been called if a link was open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        """A link that breaks soon counts as a failed try: a peer that always breaks it is not dialled in a tight loop."""
        delay_s, longest_s = BACKOFF_S
        while True:
            pause_s = delay_s
            try:
                lived_s = await self._connect_once()
            except Refused as error:
                self._on_refused(error)
                pause_s = REFUSED_S
            except (*_BROKEN, RpcError, TimeoutError) as error:
                log.debug("no link to %s: %s", self._address, error)
            else:
                if lived_s > longest_s:
                    delay_s = pause_s = BACKOFF_S[0]
            delay_s = min(2 * delay_s, longest_s)
            await asyncio.sleep(pause_s * (0.5 + self._rng.random()))

    async def _connect_once(self) -> float:
        """One stream, from dial to end; how long it was open, in seconds. Raises if none could be opened, or if refused."""
        clock = asyncio.get_running_loop().time
        async with self._channel() as channel:
            call: Any = channel.stream_stream(_METHOD)()
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    await call.write(_hello_envelope(self._hello, token=self._hello.token))
                    hello = _hello_of(await call.read())
            except _BROKEN as error:
                _raise_meaning(error)
                raise
            _check_version(hello, self._hello)
            link = Link(call, hello)
            opened_at = clock()
            await link.attend(self._callbacks)
            if isinstance(link.error, Refused):
                raise link.error
            return clock() - opened_at

    def _channel(self) -> grpc.aio.Channel:
        """A fresh one for each try: gRPC would put pauses of its own between tries of an old one."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        return grpc.aio.secure_channel(self._address, self._credentials, options=_OPTIONS)


def _raise_meaning(error: Exception) -> None:
    """What the peer said when it ended the stream is our error; a stream that merely broke is none."""
    if not isinstance(error, _BROKEN):
        raise error
    if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.PERMISSION_DENIED:
        raise Refused(error.details())
    if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.ABORTED:
        raise RpcError(f"the peer ended it: {error.details()}")
    log.debug("a stream broke: %s", error)


def _hello_of(data: Any) -> pb.Hello:
    """From the first envelope of a direction. Raises ProtocolFault."""
    try:
        envelope = pb.Envelope() if data is grpc.aio.EOF else pb.Envelope.FromString(data)
    except DecodeError as error:
        raise ProtocolFault(f"invalid envelope: {error}") from error
    if not envelope.HasField("hello"):
        raise ProtocolFault("the first message must be a hello")
    return envelope.hello


def _check_version(theirs: pb.Hello, ours: Hello) -> None:
    if theirs.major != PROTOCOL_MAJOR or abs(theirs.minor - PROTOCOL_MINOR) > 1:
        version = f"protocol {theirs.major}.{theirs.minor} of {theirs.peer}"
        raise Refused(f"{version} does not fit {PROTOCOL_MAJOR}.{PROTOCOL_MINOR} of {ours.peer}")


def _hello_envelope(hello: Hello, *, token: str) -> bytes:
    """token: the dialling side proves with it that it belongs here; the answer need not carry it."""
    mine = pb.Hello(
        major=PROTOCOL_MAJOR,
        minor=PROTOCOL_MINOR,
        peer=hello.peer,
        kind=hello.kind,
        token=token,
        compat=hello.compat,
    )
    return pb.Envelope(hello=mine).SerializeToString()


class _Pem(NamedTuple):
    key: bytes
    cert: bytes
    ca: bytes | None


def _load_pem(tls: TlsConfig, address: str) -> _Pem | None:
    """None: plain text. Both sides decide alike, and a half-given configuration never means plain text. Raises ConfigError."""
    if (tls.cert is None) != (tls.key is None) or (tls.cert is None and tls.ca is not None):
        raise ConfigError(f"tls: cert and key belong together, and ca needs them: {tls}")
    if tls.cert is None or tls.key is None or address.startswith("unix:"):
        return None
    return _Pem(_read(tls.key), _read(tls.cert), None if tls.ca is None else _read(tls.ca))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: cannot read {path}: {error.strerror}") from None
