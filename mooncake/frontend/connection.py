"""The ASGI side of one request: reading its body, sending its answer, and noticing that the client is gone or does not read.

A stream is written as fast as the client reads. A client is dropped, and its request cancelled, once its 64 KiB here (uvicorn's
high-water mark) and the kernel's buffers were full for `stall_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mooncake.frontend.backend import Generation
from mooncake.frontend.errors import ApiError, bad_field

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

ABORT_EXTENSION = "mooncake.abort"
"""Scope extension of our server: a function that drops the connection, unsent bytes included."""
MAX_FULL_BODIES = 16
"""Bodies of the largest size that are kept while they arrive; smaller ones are more."""
JSON_HEADERS = [(b"content-type", b"application/json")]


class ClientGone(Exception):
    """The client closed the connection, or was dropped because it did not read."""


class Client:
    """The connection of one request once its body is read: sends, and cancels the generation when the client is gone.

    A blocked send is noticed by a timer that looks twice per `stall_s`, so that other sends cost nothing. headers: those of
    every answer to it."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        generation: Generation,
        stall_s: float,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._headers = headers
        self._send = send
        self._generation = generation
        self._abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT_EXTENSION)
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._half_stall_s = stall_s / 2
        self._num_sent = 0
        self._sending = False
        self._num_sent_before = -1
        self._timer: asyncio.TimerHandle | None = None
        self.gone = False
        self.dropped = False
        self._watcher = self._loop.create_task(self._watch(receive))

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self._headers})

    async def send(self, body: bytes, more: bool) -> None:
        """Raises ClientGone if the client is."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._half_stall_s, self._look)
        self._sending = True
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except asyncio.CancelledError:  # by `_look`, or shutting down while this client does not read
            self._drop()
        self._sending = False
        self._num_sent += 1
        if self.gone:
            raise ClientGone

    def close(self) -> None:
        self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._generation.cancel()

    def _look(self) -> None:
        stalled = self._sending and self._num_sent == self._num_sent_before
        if stalled and self._task is not None:
            self._task.cancel()
            return
        self._num_sent_before = self._num_sent if self._sending else -1
        self._timer = self._loop.call_later(self._half_stall_s, self._look)

    def _drop(self) -> None:
        self.gone = self.dropped = True
        self._generation.cancel()
        if self._abort is not None:
            self._abort()


class Bodies:
    """Reads the bodies of requests. limit: bytes of one; of all that are being read, `MAX_FULL_BODIES` times as many are
    kept."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._num_bytes = 0

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """Raises ApiError, for a body that is too large before anything beyond the limit is kept; ClientGone if the client
        leaves."""
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            reason = f"is not supported: send the body as it is; the value is {encoding.decode('latin-1')!r:.60}"
            raise bad_field("content-encoding", reason, "unsupported_parameter")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            raise _body_too_large(self._limit)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._read(receive, parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._timeout_s:g} s", code="timeout") from None
        finally:
            self._num_bytes -= sum(map(len, parts))
        return b"".join(parts)

    async def _read(self, receive: Receive, parts: list[bytes]) -> None:
        num_bytes = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            self._num_bytes += len(parts[-1])
            if num_bytes > self._limit:
                raise _body_too_large(self._limit)
            if self._num_bytes > MAX_FULL_BODIES * self._limit:
                text = "too many large bodies are being received"
                raise ApiError(429, text, kind="rate_limit_error", code="overloaded", retry_after_s=1.0)
            more = message.get("more_body", False)


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body exceeds the limit of {limit} bytes", code="body_too_large")


class PageAnswer:
    """The `send` of a page: its answer gets the request's id. status: None before it began."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status: int | None = None
        self._send = send
        self._header = (b"x-request-id", request_id.encode())

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), self._header]}
        await self._send(message)


async def send_error(send: Send, error: ApiError, request_id: str) -> None:
    body = error.body()
    own = ((b"content-length", b"%d" % len(body)), (b"x-request-id", request_id.encode()))
    headers = [*JSON_HEADERS, *error.headers(), *own]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
