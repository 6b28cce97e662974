"""A real server on a free loopback port with the echo backend behind it, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from mooncake.engine.grammar import Grammars
from mooncake.frontend.app import create_app
from mooncake.frontend.backend import ModelInfo
from mooncake.frontend.echo import EchoBackend
from mooncake.frontend.endpoint import Settings
from mooncake.frontend.server import HttpServer
from mooncake.frontend.tenants import Door
from mooncake.frontend.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class Site:
    def __init__(self, server: HttpServer, backend: EchoBackend, client: httpx.AsyncClient) -> None:
        self.server, self.backend, self.client = server, backend, client
        self.writers: list[asyncio.StreamWriter] = []

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, content=content, headers=names)

    async def chat(self, text: str = "hello, world", **fields: Any) -> httpx.Response:
        return await self.post(CHAT, {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields})

    async def complete(self, prompt: Any = "hello, world", **fields: Any) -> httpx.Response:
        return await self.post(COMPLETIONS, {"model": "tiny", "prompt": prompt, **fields})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection with little room for what it does not read."""
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        small.setblocking(False)
        await asyncio.get_running_loop().sock_connect(small, (self.server.host, self.server.port))
        reader, writer = await asyncio.open_connection(sock=small, limit=2**12)
        self.writers.append(writer)
        return reader, writer

    async def open(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection with the request sent."""
        reader, writer = await self.connect()
        content = json.dumps(body).encode()
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(content)))
        writer.write(content)
        await writer.drain()
        return reader, writer

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def site(
    tokenizer: Tokenizer,
    *,
    max_context: int = 4096,
    step_s: float = 0.0,
    grammars: Grammars | None = None,
    door: Door | None = None,
    origins: Sequence[str] = (),
    **settings: Any,
) -> AsyncIterator[Site]:
    model = ModelInfo("tiny", max_context, tokenizer.vocab_size, "fp_tiny", 1_700_000_000)
    backend = EchoBackend(model, step_s=step_s)
    settings_here = msgspec.structs.replace(Settings(), **settings)
    app = create_app(
        backend, tokenizer, settings_here, rng=random.Random(1), grammars=grammars, door=door, origins=origins
    )
    server = HttpServer(app, "127.0.0.1", 0, grace_s=0.1)
    task = asyncio.create_task(server.run())
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        opened = Site(server, backend, client)
        yield opened
        await opened.close()
    server.stop()
    await asyncio.wait_for(task, 3)


async def until(condition: Callable[[], bool], timeout_s: float = 2.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events, without the end mark, which must be there."""
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]
