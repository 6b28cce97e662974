"""The store core's readers on the same machine: the index that they look into, and their tables."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mooncake.core.errors import SegmentError
from mooncake.store.local.index import Columns, IndexWriter
from mooncake.store.local.table import TableReader, table_prefix
from mooncake.store.readers import Answers

if TYPE_CHECKING:
    from mooncake.store.objects import Objects

MAX_TABLES = 1024


class LocalReaders:
    """Of one segment. Questions are counted from `begin` on, and answers kept for `answers`."""

    def __init__(self, index: IndexWriter, segment_path: str) -> None:
        self.index = index
        self._segment_path = segment_path
        self._tables: dict[str, TableReader] = {}
        self._num_asked = 0
        self._answers: list[tuple[int, tuple[int, ...]]] = []

    # ------------------------------------------------------------ for the core

    def publish(self, objects: Objects, rows: Sequence[int]) -> None:
        columns = Columns(
            objects.numbers,
            objects.keys,
            objects.offsets,
            objects.sizes,
            objects.checksums,
            objects.transient,
            objects.quotas.code,
        )
        self.index.publish(rows, columns)

    def withdraw(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        index = self.index
        index.hide(rows)
        index.fence()
        index.remove(rows)
        return self.reading(objects, rows)

    def reading(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        self._num_asked += 1
        if not self._tables:
            return ()
        claimed = self.claimed_numbers()
        if not claimed:
            return ()
        answer = tuple([row for row in rows if objects.numbers[row] in claimed])
        if answer:
            self._answers.append((self._num_asked - 1, answer))
        return answer

    # ------------------------------------------------------------ for the node

    def begin(self) -> None:
        self._num_asked = 0
        self._answers = []

    @property
    def answers(self) -> Answers:
        return tuple(self._answers)

    def attach(self, path: str) -> None:
        """Heed a client's table from now on. Raises SegmentError if it is none."""
        if path not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                raise SegmentError(f"{MAX_TABLES} clients read from this segment already")
            self._tables[path] = TableReader(path, self._segment_path)

    def attach_all(self) -> None:
        """Those that clients of a life before have left, and may still read under."""
        prefix = Path(table_prefix(self._segment_path))
        for path in sorted(prefix.parent.glob(prefix.name + "*")):
            with contextlib.suppress(SegmentError):
                self.attach(str(path))
        self.drop_abandoned()

    def drop_abandoned(self) -> None:
        """Clients that died, or closed their tables: their claims are gone with them."""
        for path, table in list(self._tables.items()):
            if table.is_abandoned():
                del self._tables[path]
                table.close(unlink=True)

    def take_uses(self) -> tuple[tuple[int, ...], ...]:
        return tuple([tuple(batch) for table in self._tables.values() for batch in table.take_uses()])

    @property
    def num_copies(self) -> int:
        """Into the segment, under way."""
        return sum([table.num_copies for table in self._tables.values()])

    def claimed_numbers(self) -> set[int]:
        claimed: set[int] = set()
        for table in self._tables.values():
            claimed.update(table.claims())
        claimed.discard(0)
        return claimed

    @property
    def num_tables(self) -> int:
        return len(self._tables)

    def close(self) -> None:
        """Clients keep their own files; those of the dead go."""
        self.drop_abandoned()
        for table in self._tables.values():
            table.close(unlink=False)
        self._tables.clear()
