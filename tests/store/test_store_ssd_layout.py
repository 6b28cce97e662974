"""Pages of the SSD file: what was torn, turned, or is another file's is no page, and of what is left the newest counts."""

from __future__ import annotations

import pytest

from mooncake.store.ssd_layout import (
    EXTENT_BYTES_MAX,
    PAGE_BYTES,
    PAGE_ENTRIES,
    Entry,
    Geometry,
    Page,
    geometry_of,
    num_pages,
    pack_page,
    pack_table,
    recovered,
    unpack_page,
    unpack_table,
)
from tests.store.helpers import key, keys

FILE, OTHER = b"f" * 16, b"o" * 16
GEOMETRY = geometry_of(4 << 20, 1 << 20)


def entry(number: int, extent: int = 0, size: int = 5000, at: int | None = None) -> Entry:
    offset = GEOMETRY.data_start(extent) + 8192 * (number if at is None else at)
    return Entry(key(number), offset, size, 1000 + number)


def page(sequence: int, *entries: Entry) -> Page:
    return Page(sequence, entries)


def test_a_page_is_read_as_it_was_written() -> None:
    entries = tuple([entry(number, extent=2) for number in range(PAGE_ENTRIES)])
    data = pack_page(FILE, 9, 2, entries)
    assert len(data) == PAGE_BYTES and PAGE_ENTRIES == 84
    assert unpack_page(data, FILE, 2, GEOMETRY) == Page(9, entries)
    assert unpack_page(pack_page(FILE, 9, 2), FILE, 2, GEOMETRY) == Page(9, ())


def test_every_byte_of_a_page_counts() -> None:
    data = pack_page(FILE, 9, 0, [entry(1), entry(2)])
    for at in range(PAGE_BYTES):
        changed = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
        assert unpack_page(changed, FILE, 0, GEOMETRY) is None, at


def test_a_page_cut_anywhere_is_none() -> None:
    old, new = pack_page(FILE, 3, 0, [entry(1)]), pack_page(FILE, 9, 0, [entry(number) for number in range(84)])
    for at in range(1, PAGE_BYTES):
        for before in (old, bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES):
            torn = new[:at] + before[at:]
            assert torn in (new, old) or unpack_page(torn, FILE, 0, GEOMETRY) is None


@pytest.mark.parametrize(
    "data",
    [
        bytes(PAGE_BYTES),
        b"\xff" * PAGE_BYTES,
        pack_page(OTHER, 9, 0, [entry(1)]),
        pack_page(FILE, 9, 1, [entry(1)]),
        pack_page(FILE, 0, 0, [entry(1)]),
        pack_page(FILE, 9, 0, [entry(1, extent=1)]),
        pack_page(FILE, 9, 0, [Entry(key(1), GEOMETRY.data_start(0) + 100, 10, 0)]),
        pack_page(FILE, 9, 0, [Entry(key(1), GEOMETRY.data_start(0), GEOMETRY.data_bytes + 1, 0)]),
        pack_page(FILE, 9, 0, [Entry(key(1), 0, 4096, 0)]),
    ],
    ids=["zeros", "ones", "file", "extent", "sequence", "place", "unaligned", "too long", "in the table"],
)
def test_what_is_no_page_of_this_extent(data: bytes) -> None:
    assert unpack_page(data, FILE, 0, GEOMETRY) is None


def test_a_table_has_the_pages_of_its_newest_life_without_those_that_are_torn() -> None:
    runs = [pack_table(FILE, 5, 0, [entry(number)]) for number in range(4)]
    torn = runs[1][:80] + bytes(PAGE_BYTES - 80)
    old = pack_table(FILE, 2, 0, [entry(9)])
    table = b"".join([pack_page(FILE, 5, 0), runs[0], torn, runs[2], old, runs[3], bytes(PAGE_BYTES)])
    assert unpack_table(table, FILE, 0, GEOMETRY) == page(5, entry(0), entry(2), entry(3))


def test_opening_an_extent_voids_what_it_held() -> None:
    old = pack_page(FILE, 2, 0) + pack_table(FILE, 2, 0, [entry(9)])
    assert unpack_table(old, FILE, 0, GEOMETRY) == page(2, entry(9))
    assert unpack_table(pack_page(FILE, 5, 0) + old[PAGE_BYTES:], FILE, 0, GEOMETRY) == page(5)
    assert unpack_table(bytes(8192), FILE, 0, GEOMETRY) == page(0)


def test_many_entries_take_several_pages() -> None:
    entries = [entry(number, size=1, at=0) for number in range(PAGE_ENTRIES + 1)]
    table = pack_table(FILE, 5, 0, entries)
    assert len(table) == 2 * PAGE_BYTES and num_pages(len(entries)) == 2 and num_pages(PAGE_ENTRIES) == 1
    assert unpack_table(table, FILE, 0, GEOMETRY) == Page(5, tuple(entries))


def test_of_each_key_the_newest_copy_is_found_in_the_order_of_age() -> None:
    removed = Entry(key(3), 0, 0, 0)
    tables = [page(7, entry(1), removed), page(0), page(5, entry(2, 2), entry(1, 2), entry(3, 2)), page(6, entry(2, 3))]
    found = recovered(tables)
    assert found.keys == keys(2, 1) and found.sequences == (7, 0, 5, 6)
    assert found.ssd_offsets == (entry(2, 3).offset, entry(1).offset)
    assert found.sizes == (5000, 5000) and found.checksums == (1002, 1001)


@pytest.mark.parametrize(
    ("capacity", "extent_bytes", "num_extents"),
    [
        (10 << 30, 256 << 20, 40),
        (10 * 10**9, 256 << 20, 37),
        (1 << 40, 4 << 30, 256),
        (16 << 40, EXTENT_BYTES_MAX, 4096),
        (512 << 20, 128 << 20, 4),
        (16 << 20, 4 << 20, 4),
    ],
)
def test_extents_suit_the_capacity(capacity: int, extent_bytes: int, num_extents: int) -> None:
    geometry = geometry_of(capacity)
    assert (geometry.extent_bytes, geometry.num_extents) == (extent_bytes, num_extents)
    assert geometry.capacity_bytes <= capacity < geometry.capacity_bytes + extent_bytes
    assert geometry.table_bytes == max(16 * PAGE_BYTES, extent_bytes // 128)
    assert geometry.data_bytes + geometry.table_bytes == extent_bytes


def test_a_capacity_without_room_for_an_extent_is_none() -> None:
    with pytest.raises(ValueError, match="4096 bytes have no room"):
        geometry_of(4096)
    with pytest.raises(ValueError, match="no room for extents of 1048576"):
        geometry_of(1 << 19, 1 << 20)


def test_places_of_an_extent() -> None:
    geometry = Geometry(2, 32 * PAGE_BYTES, 16 * PAGE_BYTES)
    assert geometry.holds(1, 48 * PAGE_BYTES, 16 * PAGE_BYTES) and not geometry.holds(0, 48 * PAGE_BYTES, 1)
    assert not geometry.holds(1, 48 * PAGE_BYTES, 16 * PAGE_BYTES + 1) and not geometry.holds(1, 47 * PAGE_BYTES, 1)
