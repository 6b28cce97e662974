"""A client of one store node over its data port. See `StoreOperations` for the calls.

    client = await StoreClient.connect(["unix:/run/mooncake/n0.sock", "tcp://10.0.0.1:7100"], token=...,
    name="prefill-0") reservation = await client.reserve(keys, sizes)
    reservation.write(0, 0, data)                      # in any thread
    await client.commit(reservation)
    objects = await client.lease(keys)
    objects.read(0, 0, out)                            # or objects.view(0) on the same machine
    await client.release(objects)

When the connection is lost, all its reservations and leases are (HandleLost), calls fail at once with StoreUnavailable,
and the client connects again by itself; what is asked after that finds a new connection, perhaps to a new life of the
node.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import Any, cast

from mooncake.core.errors import (
    AuthError,
    BadArgument,
    DeadlineExceeded,
    ProtocolError,
    StoreError,
    StoreUnavailable,
)
from mooncake.store import wire
from mooncake.store.events import Request, fault_of
from mooncake.store.exchange import Exchange
from mooncake.store.handles import Link
from mooncake.store.links import open_link
from mooncake.store.operations import DEADLINE_S, StoreOperations, until
from mooncake.transport.frames import Frame, FrameReader
from mooncake.transport.tcp import parse_address

_BACKOFF_S = (0.05, 1.0)


class _Connection(asyncio.Protocol):
    """One control connection: requests out, answers in, matched by number."""

    def __init__(self, client: StoreClient) -> None:
        loop = asyncio.get_running_loop()
        self.welcome: asyncio.Future[wire.Welcome] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.link: Link | None = None
        self.error: StoreError | None = None
        self.capacity = 0
        self._client = client
        self._greeting: FrameReader | None = FrameReader(wire.MAX_HELLO_BYTES)
        self._exchange = Exchange()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it

    def data_received(self, data: bytes) -> None:
        try:
            if self._greeting is not None:
                self._on_greeting(self._greeting.feed(data))
                return
            answers, undoing = self._exchange.receive(data)
        except StoreError as error:
            self.lose(error)
            return
        if undoing:
            self.send(undoing)
        for number, outcome in answers:
            future = self._waiting.pop(number)
            if isinstance(outcome, StoreError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def eof_received(self) -> bool:
        """Keeps our half open: the node frees our claims when it closes, and a copy may still be running."""
        self.lose(StoreUnavailable("the node closed the connection"))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(StoreUnavailable(f"the connection broke: {exc}" if exc else "closed"))
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def request(self, request: Request) -> asyncio.Future[Any]:
        return self._ask(*self._exchange.ask(request))

    def attach(self, table: str) -> asyncio.Future[Any]:
        return self._ask(*self._exchange.attach(table))

    def _ask(self, number: int, data: bytes) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        future.add_done_callback(lambda future: self._given_up(number) if future.cancelled() else None)
        self.send(data)
        return future

    def _given_up(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None:
            self._exchange.abandon(number)

    def lose(self, error: StoreError) -> None:
        """The connection is of no more use. It is closed once no data call uses its claims."""
        self.error = self.error or error
        if not self.welcome.done():
            self.welcome.set_exception(error)
        if self.link is not None and self.link.lost is None:
            self.link.lose(str(error))
            self._client.connection_lost(self)
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(StoreUnavailable(str(error)))

    async def close(self, *, release: bool = True) -> None:
        """Waits for data calls first; their time limits bound that. release: leases that would outlive the connection."""
        self.lose(StoreUnavailable("closed"))
        if self.link is not None:
            await until(self.link.idle)
            self.link.close(release=release)
        assert self._transport is not None
        self._transport.abort()  # what was not sent yet is of no use: the node frees all there is
        await self.closed

    def _on_greeting(self, frames: list[Frame]) -> None:
        if not frames:
            return
        if len(frames) > 1:
            raise ProtocolError("the node said more than WELCOME")
        if wire.is_error(frames[0]):
            raise wire.decode_error(frames[0])
        self.welcome.set_result(wire.decode_welcome(frames[0]))
        self._greeting = None


class StoreClient(StoreOperations):
    """Made by `connect`; used from the event loop that made it."""

    def __init__(self, addresses: Sequence[str], *, token: str, name: str, tenant: str, node: str) -> None:
        if not addresses:
            raise BadArgument("addresses: at least one is needed")
        self._addresses = sorted(addresses, key=lambda address: not address.startswith("unix:"))  # cheapest first
        self._hello = wire.Hello(wire.VERSION, token, name, tenant, minor=wire.MINOR)
        self._node = node
        self._current: _Connection | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def connect(
        cls,
        addresses: Sequence[str],
        *,
        token: str,
        name: str,
        tenant: str = "",
        node: str = "",
        deadline_s: float = DEADLINE_S,
    ) -> StoreClient:
        """node: the name it must have, if given: a Unix path may lead to this machine's node instead of the one meant.

        Raises AuthError, StoreUnavailable (no address leads to it) or DeadlineExceeded."""
        client = cls(addresses, token=token, name=name, tenant=tenant, node=node)
        try:
            async with asyncio.timeout(deadline_s):
                await client._connect()
        except TimeoutError:
            raise DeadlineExceeded(f"no connection to {client._addresses} in {deadline_s} s") from None
        return client

    @property
    def connected(self) -> bool:
        return self._current is not None

    async def close(self) -> None:
        """Waits for data calls that are running."""
        self._is_closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
        if self._current is not None:
            await self._current.close()
            self._current = None

    def connection_lost(self, connection: _Connection) -> None:
        """From the connection, once in its life, after it was in use."""
        if self._current is connection and not self._is_closed:
            self._current = None
            self._reconnecting = asyncio.get_running_loop().create_task(self._replace(connection))

    def _link_or_raise(self) -> Link:
        connection = self._connection_or_raise()
        assert connection.link is not None
        return connection.link

    async def _call(self, request: Request, deadline_s: float) -> Any:
        connection = self._connection_or_raise()
        fault = fault_of(request, connection.capacity)
        if fault is not None:
            raise BadArgument(fault)
        try:
            async with asyncio.timeout(deadline_s):
                return await connection.request(request)
        except TimeoutError:
            raise DeadlineExceeded(f"{type(request).__name__.lower()}: no answer in {deadline_s} s") from None

    def _connection_or_raise(self) -> _Connection:
        if self._current is None:
            raise StoreUnavailable(f"not connected to {self._node or self._addresses[0]}")
        return self._current

    async def _replace(self, lost: _Connection) -> None:
        await lost.close(release=False)
        delay_s, longest_s = _BACKOFF_S
        while True:
            with contextlib.suppress(StoreError, TimeoutError):
                async with asyncio.timeout(DEADLINE_S):
                    await self._connect()
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, longest_s)

    async def _connect(self) -> None:
        failures = []
        for address in self._addresses:
            try:
                self._current = await self._connect_to(address)
                return
            except AuthError:
                raise
            except (StoreError, OSError) as error:
                failures.append(f"{address}: {error}")
        raise StoreUnavailable(f"no address leads to the store node: {'; '.join(failures)}")

    async def _connect_to(self, address: str) -> _Connection:
        loop = asyncio.get_running_loop()
        family, target = parse_address(address)
        connection = _Connection(self)
        if family == socket.AF_UNIX:
            await loop.create_unix_connection(lambda: connection, str(target))
        else:
            await loop.create_connection(lambda: connection, *target)
        try:
            connection.send(wire.encode_hello(self._hello))
            welcome = await connection.welcome
            if self._node and welcome.node != self._node:
                raise StoreUnavailable(f"is node {welcome.node}, not {self._node}")
            connection.capacity = welcome.capacity
            link = await asyncio.to_thread(open_link, address, self._hello, welcome)
            if link.local is not None:
                await connection.attach(link.local.table.path)
            if connection.error is not None:
                link.close(release=True)
                raise connection.error
        except BaseException:
            await connection.close()
            raise
        connection.link = link
        return connection
