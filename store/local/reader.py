"""A client's reads of its own machine's node, which need no word to the node."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from mooncake.core.errors import BadArgument
from mooncake.store.local.index import Found, IndexReader
from mooncake.store.local.table import ClientTable
from mooncake.transport.base import copy
from mooncake.transport.shm import ShmPath


class LocalReader:
    """Of one life of one node. For any number of threads.

    index: look-ups need no lock. What it says is good as long as the object is leased, or says the same afterwards."""

    def __init__(self, path: ShmPath, epoch: int, num_entries: int) -> None:
        """Raises SegmentError where there is no index, or no room for the client's table."""
        self.epoch = epoch
        self.index = IndexReader(path.front, num_entries)
        self.table = ClientTable(path.region.handle)
        self._path = path
        self._lock = threading.Lock()
        self._retired = False

    def lease(self, keys: Sequence[bytes]) -> tuple[list[Found], list[int]] | None:
        """Where all of these are, which stay there until the slots are released; None if one of them is not here."""
        index = self.index
        found: list[Found] = []
        for key in keys:
            each = index.find(key)
            if each is None:
                return None
            found.append(each)
        with self._lock:
            slots = None if self._retired else self.table.claim([each.number for each in found])
            if slots is None:
                return None
            if not index.are_current(found):
                self.table.release(slots)
                return None
            self.table.use([each.row for each in found])
        return found, slots

    def copy_out(self, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[int] | None:
        """Sizes of all these objects, which are in the buffers now; None if one of them is not here. Raises BadArgument if one
        is longer than its buffer."""
        find, view = self.index.find, self._path.view
        found: list[Found] = []
        for at, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            each = find(key)
            if each is None:
                return None
            _, _, offset, size, _ = each
            if buffer.nbytes != size:
                if buffer.nbytes < size:
                    raise BadArgument(f"buffers[{at}]: {buffer.nbytes} bytes for an object of {size}")
                buffer = buffer[:size]
            copy(buffer, view(offset, size))
            found.append(each)
        if not self.index.are_current(found):
            return None  # something was evicted under the copy
        with self._lock:
            if not self._retired:
                self.table.use([each.row for each in found])
        return [each.size for each in found]

    def release(self, slots: Sequence[int]) -> None:
        with self._lock:
            self.table.release(slots)
            if self._retired and not self.table.num_claims:
                self.table.close()

    def begin_write(self) -> bool:
        """Whether the client may copy into what it has reserved: not if another life of the node has the segment by now."""
        with self._lock:
            if self._retired:
                return False
            self.table.begin_copy()
            if self._path.epoch == self.epoch:
                return True
            self.table.end_copy()
            return False

    def end_write(self) -> None:
        with self._lock:
            self.table.end_copy()

    def retire(self) -> None:
        """The connection to the node is lost. What is leased stays so until it is released; nothing else begins. No write is
        under way."""
        with self._lock:
            if not self._retired:
                self._retired = True
                if not self.table.num_claims:
                    self.table.close()

    def close(self) -> None:
        """Leases go with it."""
        with self._lock:
            if not self._retired or self.table.num_claims:
                self.table.close()
            self._retired = True
