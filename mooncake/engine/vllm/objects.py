"""A request's objects in the store, to be read and written layer by layer from the copying threads (`KvReader`, `KvWriter`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from mooncake.core.errors import StoreError
from mooncake.store import contents
from mooncake.store.api import Store, WriteBatch
from mooncake.store.handles import LeasedObjects


class ObjectReader:
    """The objects [first, first + len(keys)) of a request. `open` fetches them and compares them with their checksums: on this
    machine they are leased and read in place, from elsewhere copied. After that nothing can go wrong."""

    def __init__(self, store: Store, keys: Sequence[bytes], first: int, sizes: Sequence[int], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._store = store
        self._keys = keys
        self._first = first
        self._sizes = sizes
        self._views: list[memoryview | None] = []
        self._leases = contextlib.ExitStack()

    @property
    def num_objects(self) -> int:
        return len(self._keys)

    def open(self) -> int:
        """How many leading ones there are, as they were put."""
        self._views = [None] * len(self._keys)
        with contextlib.suppress(StoreError):
            self._view(self._leases.enter_context(self._store.leased(self._keys)))
        with contextlib.suppress(StoreError):
            self._copy([at for at, view in enumerate(self._views) if view is None])
        return next((at for at, view in enumerate(self._views) if view is None), len(self._views))

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        """Of a leading one that there is."""
        view = self._views[index - self._first]
        assert view is not None
        use(view[offset : offset + size])

    def close(self) -> None:
        self._views.clear()
        self._leases.close()

    def _view(self, objects: LeasedObjects) -> None:
        if not objects.mapped:
            return
        for at, (place, checksum) in enumerate(zip(objects.locations, objects.checksums, strict=True)):
            if place is None or place.size != self._sizes[at]:
                continue
            view = objects.view(at)
            if checksum is None or contents.checksum(view) == checksum:
                self._views[at] = view

    def _copy(self, indices: Sequence[int]) -> None:
        """From other nodes, or over the network. Of damaged ones the store learns here, too."""
        if not indices:
            return
        buffers = [bytearray(self._sizes[at]) for at in indices]
        sizes = self._store.get_into_batch([self._keys[at] for at in indices], buffers)
        for at, buffer, size in zip(indices, buffers, sizes, strict=True):
            if size == self._sizes[at]:
                self._views[at] = memoryview(buffer)


class ObjectWriter:
    """The objects [first, first + len(keys)) of a request. They are reserved when their first bytes come."""

    num_stored = 0

    def __init__(self, store: Store, keys: Sequence[bytes], first: int, sizes: Sequence[int], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._store = store
        self._keys = keys
        self._first = first
        self._sizes = sizes
        self._batch: WriteBatch | None = None

    def wants(self, index: int) -> bool:
        """Raises StoreError."""
        return self._reserved().results[index - self._first] is None

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        self._reserved().fill(index - self._first, offset, size, fill)

    def commit(self) -> None:
        """All of them are whole. Raises StoreError."""
        batch = self._reserved()
        batch.commit([at for at, result in enumerate(batch.results) if result is None])

    def close(self) -> None:
        """Give up what is not committed."""
        if self._batch is not None:
            with contextlib.suppress(StoreError):
                self._batch.close()

    def _reserved(self) -> WriteBatch:
        if self._batch is None:
            self._batch = self._store.write_batch(self._keys, self._sizes)
        return self._batch
