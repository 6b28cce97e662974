"""`mooncake.store.api` for programs on an event loop: the same calls, awaited, each in a thread of its own pool.

    async with await AsyncStore.connect(["unix:/run/mooncake/n0.sock"], token=...) as store:
        await store.put(key, data)
        data = await store.get(key)

Services that hold many reservations and leases over time use `mooncake.store.client`, whose calls need no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

from mooncake.store.api import PutResult, Replica, Stat, Store
from mooncake.store.handles import LeasedObjects
from mooncake.store.reading import Absent

_P = ParamSpec("_P")
_T = TypeVar("_T")
THREADS = 8
"""Of one store: as many calls as are under way at once."""


class AsyncStore:
    """store: may be used beside it; closing this closes it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(THREADS, "store")

    @classmethod
    async def connect(cls, addresses: Sequence[str] = (), **options: Any) -> Self:
        """As `Store.connect`."""
        return cls(await asyncio.to_thread(partial(Store.connect, addresses, **options)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.to_thread(self.store.close)
        self._threads.shutdown(wait=False)

    async def put(self, key: bytes, data: Any, *, strict: bool = False, replicas: int = 1) -> PutResult:
        return await self._run(self.store.put, key, data, strict=strict, replicas=replicas)

    async def put_batch(
        self, keys: Sequence[bytes], data: Sequence[Any], *, strict: bool = False, replicas: int = 1
    ) -> list[PutResult]:
        return await self._run(self.store.put_batch, keys, data, strict=strict, replicas=replicas)

    async def get(self, key: bytes) -> bytes | Absent:
        return await self._run(self.store.get, key)

    async def get_batch(self, keys: Sequence[bytes]) -> list[bytes | Absent]:
        return await self._run(self.store.get_batch, keys)

    async def get_into(self, key: bytes, buffer: Any) -> int | Absent:
        return await self._run(self.store.get_into, key, buffer)

    async def get_into_batch(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> list[int | Absent]:
        return await self._run(self.store.get_into_batch, keys, buffers)

    @contextlib.asynccontextmanager
    async def view(self, key: bytes) -> AsyncIterator[memoryview | Absent]:
        context = self.store.view(key)
        view = await self._run(context.__enter__)
        try:
            yield view
        finally:
            await self._run(context.__exit__)

    @contextlib.asynccontextmanager
    async def leased(self, keys: Sequence[bytes]) -> AsyncIterator[LeasedObjects]:
        context = self.store.leased(keys)
        objects = await self._run(context.__enter__)
        try:
            yield objects
        finally:
            await self._run(context.__exit__, None, None, None)

    async def exists(self, key: bytes) -> bool:
        return await self._run(self.store.exists, key)

    async def exists_batch(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._run(self.store.exists_batch, keys)

    async def stat_batch(self, keys: Sequence[bytes]) -> list[Stat | None]:
        return await self._run(self.store.stat_batch, keys)

    async def locate(self, keys: Sequence[bytes]) -> list[list[Replica]]:
        return await self._run(self.store.locate, keys)

    async def replicate(self, keys: Sequence[bytes], replicas: int, deadline_s: float | None = None) -> list[int]:
        return await self._run(self.store.replicate, keys, replicas, deadline_s)

    async def remove(self, key: bytes) -> bool:
        return await self._run(self.store.remove, key)

    async def remove_batch(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._run(self.store.remove_batch, keys)

    async def pin(self, key: bytes) -> bool:
        return await self._run(self.store.pin, key)

    async def unpin(self, key: bytes) -> bool:
        return await self._run(self.store.unpin, key)

    async def _run(self, call: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *arguments, **options))
