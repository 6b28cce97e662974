"""How a node's SSD file is laid out: pure functions between bytes and what they mean.

    file     header page, then extents of one size
    extent   | table: page 0 | page 1 | ... | data: object | object | ...                         |
    page     magic, checksum of the rest, file, sequence number of the extent, number of entries, entries
    entry    key, offset, size, checksum of the contents; a size of 0 says that the key was removed

Extents are filled one after the other, and the oldest is used again for the newest. What one write adds to an extent is a
*run*: objects behind those that are there, and then, in pages of the table that nobody has written since the extent was
opened, their entries. So a page that is there speaks of contents that are there, and a page that was torn, or that was
never written, takes nothing with it but its own objects.

An extent is opened by a page 0 without entries, under a sequence number higher than any before. That voids what the
extent held: of its pages only those count that carry the highest number. Among entries of one key the newest counts.
Contents are not looked at before somebody reads them; their checksum tells then whether they are what was written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import msgspec
import xxhash

from mooncake.store.events import SsdRecovered

PAGE_BYTES = 4096
"""What disks write whole, and what direct I/O is aligned to."""
_PAGE = struct.Struct("<8sQ16sQII")
_ENTRY = struct.Struct("<24sQQQ")
_MAGIC = b"MOONSSDT"
_CHECKED_FROM = 16
"""Magic and checksum come before what is checked."""
PAGE_ENTRIES = (PAGE_BYTES - _PAGE.size) // _ENTRY.size
TABLE_SHARE = 128
"""Of an extent, for its table: enough for jobs of 512 KiB on average, and little to read at a start."""
_TABLE_PAGES_MIN = 16
EXTENTS = 64
"""By default: reusing one loses a 64th of what is stored, and one that an object does not fit into any more wastes less."""
EXTENT_BYTES_MIN, EXTENT_BYTES_MAX = 256 << 20, 4 << 30
"""Several blocks of a large model, unless the whole is small."""


class Geometry(msgspec.Struct, frozen=True):
    """Of all extents. page_bytes: what objects and pages of the table are aligned to."""

    num_extents: int
    extent_bytes: int
    table_bytes: int
    page_bytes: int = PAGE_BYTES

    @property
    def capacity_bytes(self) -> int:
        return self.num_extents * self.extent_bytes

    @property
    def data_bytes(self) -> int:
        """Of each extent, for objects."""
        return self.extent_bytes - self.table_bytes

    @property
    def table_pages(self) -> int:
        return self.table_bytes // self.page_bytes

    def rounded(self, size: int) -> int:
        return -(-size // self.page_bytes) * self.page_bytes

    def data_start(self, extent: int) -> int:
        return extent * self.extent_bytes + self.table_bytes

    def holds(self, extent: int, offset: int, size: int) -> bool:
        """Whether an object of that place and size can be in that extent."""
        start = self.data_start(extent)
        return start <= offset and offset + size <= start + self.data_bytes and (offset - start) % self.page_bytes == 0


def geometry_of(capacity_bytes: int, extent_bytes: int | None = None, page_bytes: int = PAGE_BYTES) -> Geometry:
    """extent_bytes: None, a power of two that suits the capacity, so that another capacity often has the same. Raises
    ValueError if there is no room for one extent."""
    if extent_bytes is None:
        wanted = min(EXTENT_BYTES_MAX, max(EXTENT_BYTES_MIN, capacity_bytes // EXTENTS))
        extent_bytes = 1 << (min(wanted, max(1, capacity_bytes // 4)).bit_length() - 1)
    pages = extent_bytes // page_bytes
    table_pages = max(_TABLE_PAGES_MIN, pages // TABLE_SHARE)
    if pages <= table_pages or capacity_bytes < pages * page_bytes:
        raise ValueError(f"{capacity_bytes} bytes have no room for extents of {extent_bytes} bytes")
    extent_bytes = pages * page_bytes
    return Geometry(capacity_bytes // extent_bytes, extent_bytes, table_pages * page_bytes, page_bytes)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """size: 0, the key was removed."""

    key: bytes
    offset: int
    size: int
    checksum: int


class Page(msgspec.Struct, frozen=True):
    sequence: int
    entries: tuple[Entry, ...]


def pack_page(file_id: bytes, sequence: int, extent: int, entries: Sequence[Entry] = ()) -> bytes:
    """file_id: 16 bytes that no other file has, so that pages of a file that was here before are none."""
    body = b"".join([_ENTRY.pack(entry.key, entry.offset, entry.size, entry.checksum) for entry in entries])
    head = _PAGE.pack(_MAGIC, 0, file_id, sequence, extent, len(entries))
    page = (head + body).ljust(PAGE_BYTES, b"\0")
    checksum = xxhash.xxh3_64_intdigest(page[_CHECKED_FROM:])
    return page[:8] + checksum.to_bytes(8, "little") + page[_CHECKED_FROM:]


def pack_table(file_id: bytes, sequence: int, extent: int, entries: Sequence[Entry]) -> bytes:
    """As many pages as the entries of one run take."""
    parts = range(0, len(entries), PAGE_ENTRIES)
    return b"".join([pack_page(file_id, sequence, extent, entries[at : at + PAGE_ENTRIES]) for at in parts])


def num_pages(num_entries: int) -> int:
    return -(-num_entries // PAGE_ENTRIES)


def unpack_page(data: bytes, file_id: bytes, extent: int, geometry: Geometry) -> Page | None:
    """None if it is torn, of another file or extent, or speaks of places that are not in the extent."""
    magic, checksum, file, sequence, number, count = _PAGE.unpack_from(data)
    if magic != _MAGIC or checksum != xxhash.xxh3_64_intdigest(data[_CHECKED_FROM:PAGE_BYTES]):
        return None
    if file != file_id or number != extent or not sequence or count > PAGE_ENTRIES:
        return None
    entries = [Entry(*_ENTRY.unpack_from(data, _PAGE.size + at * _ENTRY.size)) for at in range(count)]
    if not all(geometry.holds(extent, entry.offset, entry.size) for entry in entries if entry.size):
        return None
    return Page(sequence, tuple(entries))


def unpack_table(data: bytes, file_id: bytes, extent: int, geometry: Geometry) -> Page:
    """What an extent holds, as one page: sequence number 0 if it was never opened."""
    pages = [
        page
        for at in range(0, len(data), PAGE_BYTES)
        if (page := unpack_page(data[at : at + PAGE_BYTES], file_id, extent, geometry)) is not None
    ]
    return merged(pages)


def merged(pages: Sequence[Page]) -> Page:
    """What pages of one extent say together, those of its earlier lives left out."""
    newest = max([page.sequence for page in pages], default=0)
    return Page(newest, tuple([entry for page in pages if page.sequence == newest for entry in page.entries]))


def recovered(tables: Iterable[Page]) -> SsdRecovered:
    """What a log with these tables, one of each extent, holds: of each key the newest copy, in the order of their age."""
    in_order = list(tables)
    found: dict[bytes, Entry] = {}
    for table in sorted(in_order, key=lambda table: table.sequence):
        for entry in table.entries:
            found.pop(entry.key, None)
            if entry.size:
                found[entry.key] = entry
    entries = found.values()
    return SsdRecovered(
        tuple(found),
        tuple([entry.size for entry in entries]),
        tuple([entry.offset for entry in entries]),
        tuple([entry.checksum for entry in entries]),
        tuple([table.sequence for table in in_order]),
    )
