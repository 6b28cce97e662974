"""A client's reads of its own machine's node, which need no word to the node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mooncake.store.contents import copy_hashed
from mooncake.store.local.index import Found, IndexReader
from mooncake.store.local.table import ClientTable
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
        if not keys:
            return None
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

    def copy_out(self, keys: Sequence[bytes], buffer_for: Callable[[int, int], memoryview]) -> list[int] | None:
        """Sizes of all these objects, which are now where buffer_for(index, size) says; None if one of them is not here, or not
        what its writer put."""
        find, view = self.index.find, self._path.view
        found: list[Found] = []
        for at, key in enumerate(keys):
            each = find(key)
            if each is None:
                return None
            _, _, offset, size, checksum = each
            copied = copy_hashed(buffer_for(at, size), view(offset, size))
            if checksum is not None and copied != checksum:
                return None  # damaged, or evicted under the copy
            found.append(each)
        if not self.index.are_current(found):
            return None
        with self._lock:
            if not self._retired:
                self.table.use([each.row for each in found])
        return [each.size for each in found]

    def open(self, key: bytes) -> tuple[memoryview, int] | None:
        """The object itself, and the slot that keeps it as it is until it is released; None if it is not here. What `lease`
        does for many, in a few microseconds."""
        found = self.index.find(key)
        if found is None:
            return None
        with self._lock:
            slots = None if self._retired else self.table.claim((found.number,))
            if slots is None:
                return None
            if not self.index.is_current(found):
                self.table.release(slots)
                return None
            self.table.use((found.row,))
        return self._path.view(found.offset, found.size).toreadonly(), slots[0]

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
