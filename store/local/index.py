"""The index in a node's segment: which committed object lies where, for readers of the same machine.

    header   number of entries | number of cells | 0 ...                     8 words
    cells    open addressing, linear probing: 0 | GONE | tag and row         1 word each, twice as many as entries, or more
    entries  number | key, 3 words | offset | size | checksum | flags        8 words each, by row

The node is the only writer. A reader that comes across a change finds nothing, or an entry of another number than it thought:
both are misses, and a miss is always a legal answer.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import xxhash

from mooncake.core.errors import SegmentError
from mooncake.core.keys import OBJECT_KEY_BYTES
from mooncake.store.local.memory import Fence, words

WORD = 8
HEADER_WORDS = 8
ENTRY_WORDS = 8
BYTES_PER_ENTRY = 8192
"""By default there is an entry for so many bytes of the segment: smaller objects that find none are read by asking the node."""
MAX_ENTRIES = 1 << 24
HAS_CHECKSUM = 1
TRANSIENT = 2
"""It ends with its last lease, so no later life of the node wants it."""
_OWNER_SHIFT = 16
"""The upper bits of the flags are the tenant's number."""

_GONE = 1
"""An entry was here; others may follow. No cell of a row looks like it, as tags have their highest bit set."""
_TAG = 1 << 63
_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
_TAG_MASK = ~_ROW_MASK
_ENTRY = struct.Struct(f"@Q{OBJECT_KEY_BYTES}sQQQQ")
_pack_content = struct.Struct(f"@{OBJECT_KEY_BYTES}sQQQQ").pack_into
_hash = xxhash.xxh3_64_intdigest


class Found(NamedTuple):
    """An entry as it was read; good as long as the entry has this number."""

    row: int
    number: int
    offset: int
    size: int
    checksum: int | None


_T = TypeVar("_T")
Column = Sequence[_T] | Mapping[int, _T]


class Columns(NamedTuple):
    """Of a node's objects, by row (`mooncake.store.objects`). transient: those that are not for `listed`. owner: a tenant's
    number, 0 for none."""

    numbers: Column[int]
    keys: Column[bytes]
    offsets: Column[int]
    sizes: Column[int]
    checksums: Mapping[int, int]
    transient: Container[int]
    owner: Callable[[int], int]


def num_entries_for(capacity: int) -> int:
    return min(max(capacity // BYTES_PER_ENTRY, 64), MAX_ENTRIES)


def index_bytes(num_entries: int) -> int:
    return WORD * (HEADER_WORDS + _num_cells(num_entries) + ENTRY_WORDS * num_entries)


def _num_cells(num_entries: int) -> int:
    return 1 << (2 * num_entries - 1).bit_length()


class _Index:
    def __init__(self, memory: memoryview, num_entries: int) -> None:
        self.num_entries = num_entries
        num_cells = _num_cells(num_entries)
        self._mask = num_cells - 1
        cells_end = HEADER_WORDS + num_cells
        all_words = words(memory[: index_bytes(num_entries)])
        self._header = all_words[:HEADER_WORDS]
        self._cells = all_words[HEADER_WORDS:cells_end]
        self._entries = all_words[cells_end:]
        self._entry_bytes = self._entries.cast("B")


class IndexWriter(_Index):
    """The node's side. Rows at or above num_entries are not listed."""

    def __init__(self, memory: memoryview, num_entries: int) -> None:
        super().__init__(memory, num_entries)
        self._cell_of = array("Q", bytes(WORD * num_entries))
        """By row, its cell plus one, 0 for none."""
        self.fence = Fence()

    def format(self) -> None:
        """Begin empty. Nobody reads the memory yet."""
        self._header[0], self._header[1] = self.num_entries, self._mask + 1
        self._entries.cast("B")[:] = bytes(self._entries.nbytes)
        self._cells.cast("B")[:] = bytes(self._cells.nbytes)

    def publish(self, rows: Iterable[int], columns: Columns) -> None:
        """These rows are not listed; their objects are all there."""
        numbers, keys, offsets, sizes, checksums, transient, owner = columns
        content, entries, num_entries = self._entry_bytes, self._entries, self.num_entries
        cells, mask, cell_of = self._cells, self._mask, self._cell_of
        for row in rows:
            if row >= num_entries:
                continue
            at, key, checksum = row * ENTRY_WORDS, keys[row], checksums.get(row)
            flags = (0 if checksum is None else HAS_CHECKSUM) | (TRANSIENT if row in transient else 0)
            flags |= owner(row) << _OWNER_SHIFT
            _pack_content(content, (at + 1) * WORD, key, offsets[row], sizes[row], checksum or 0, flags)
            entries[at] = numbers[row]
            code = _hash(key)
            cell = code & mask
            while cells[cell] > _GONE:
                cell = (cell + 1) & mask
            cells[cell] = _TAG | (code & _TAG_MASK) | row
            cell_of[row] = cell + 1

    def hide(self, rows: Iterable[int]) -> None:
        """Nobody finds these from now on, and who has found one and looks again sees it. Behind this belongs the fence."""
        entries, num_entries = self._entries, self.num_entries
        for row in rows:
            if row < num_entries:
                entries[row * ENTRY_WORDS] = 0

    def remove(self, rows: Iterable[int]) -> None:
        """Hidden ones are listed no more."""
        cells, mask, cell_of, num_entries = self._cells, self._mask, self._cell_of, self.num_entries
        for row in rows:
            cell = cell_of[row] - 1 if row < num_entries else -1
            if cell < 0:
                continue
            cell_of[row] = 0
            if cells[(cell + 1) & mask]:
                cells[cell] = _GONE
                continue
            cells[cell] = 0
            cell = (cell - 1) & mask
            while cells[cell] == _GONE:
                cells[cell] = 0
                cell = (cell - 1) & mask

    def owner(self, row: int) -> int:
        """The number of the tenant whose it was published as."""
        return self._entries[row * ENTRY_WORDS + ENTRY_WORDS - 1] >> _OWNER_SHIFT

    def listed(self) -> list[tuple[bytes, Found]]:
        """What the memory says is there, as another life of the node has left it: each key once."""
        found: dict[bytes, Found] = {}
        for row in range(self.num_entries):
            number, key, offset, size, checksum, flags = _ENTRY.unpack_from(self._entry_bytes, row * ENTRY_WORDS * WORD)
            if number and not flags & TRANSIENT:
                found[key] = Found(row, number, offset, size, checksum if flags & HAS_CHECKSUM else None)
        return list(found.items())


class IndexReader(_Index):
    """A client's side. Raises SegmentError if the memory is no index of that size."""

    def __init__(self, memory: memoryview, num_entries: int) -> None:
        if not 0 < num_entries <= MAX_ENTRIES or memory.nbytes < index_bytes(num_entries):
            raise SegmentError(f"an index of {num_entries} entries does not fit into {memory.nbytes} bytes")
        super().__init__(memory, num_entries)
        if (self._header[0], self._header[1]) != (num_entries, self._mask + 1):
            raise SegmentError(f"no index of {num_entries} entries: {list(self._header[:2])}")

    def contains(self, key: bytes) -> bool:
        """Whether the object is in memory. The quickest question there is, about a microsecond."""
        cells, mask, code = self._cells, self._mask, _hash(key)
        cell = code & mask
        wanted = _TAG | (code & _TAG_MASK)
        while word := cells[cell]:
            if word & _TAG_MASK == wanted:
                at = (word & _ROW_MASK) * ENTRY_WORDS
                if self._entry_bytes[at * WORD + WORD : at * WORD + 32] == key and self._entries[at]:
                    return True
            cell = (cell + 1) & mask
        return False

    def find(self, key: bytes) -> Found | None:
        cells, mask, code = self._cells, self._mask, _hash(key)
        cell = code & mask
        wanted = _TAG | (code & _TAG_MASK)
        while word := cells[cell]:
            if word & _TAG_MASK == wanted:
                row = word & _ROW_MASK
                number, found, offset, size, checksum, flags = _ENTRY.unpack_from(
                    self._entry_bytes, row * ENTRY_WORDS * WORD
                )
                if found == key and number:
                    return Found(row, number, offset, size, checksum if flags & HAS_CHECKSUM else None)
            cell = (cell + 1) & mask
        return None

    def is_current(self, found: Found) -> bool:
        """Whether it is still there, and so whatever was read of it since is good."""
        return self._entries[found.row * ENTRY_WORDS] == found.number

    def are_current(self, found: Sequence[Found]) -> bool:
        entries = self._entries
        return all(entries[each.row * ENTRY_WORDS] == each.number for each in found)
