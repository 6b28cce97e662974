"""Whole lines, however the file comes in."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.trace.lines import BLANK_BYTES_MAX, CHUNK_BYTES, LINE_BYTES_MAX, BadLine, blocks, lines_of, shown


class Dribble(io.BytesIO):
    """Gives a few bytes at a time."""

    def __init__(self, content: bytes, piece: int) -> None:
        super().__init__(content)
        self.piece = piece

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self.piece)


class Endless(io.BytesIO):
    """One byte for ever; counts what was asked of it."""

    num_read = 0

    def __init__(self, byte: bytes) -> None:
        self.chunk = byte * CHUNK_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self.num_read += len(self.chunk)
        return self.chunk


def lines(content: bytes, piece: int = 1 << 20) -> list[bytes]:
    return list(lines_of(blocks(Dribble(content, piece))))


@given(st.lists(st.text("ab{ ", max_size=5)), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 9))
def test_lines_are_those_of_the_file_but_blank_ones_at_the_end(
    texts: list[str], end: str, ends: bool, piece: int
) -> None:
    content = end.join(texts) + (end if ends else "")
    expected = content.split("\n")
    while expected and not expected[-1].strip():
        expected.pop()
    assert [line.decode() for line in lines(content.encode(), piece)] == expected


def test_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert lines(b"\xef\xbb\xbfa\nb\n") == lines(b"\xef\xbb\xbfa\nb\n", 1) == [b"a", b"b"]


def test_what_has_no_line_end_is_refused_without_reading_it() -> None:
    file = Endless(b"x")
    with pytest.raises(BadLine, match="longer than 16 MiB"):
        list(blocks(file))
    assert file.num_read <= LINE_BYTES_MAX + 2 * CHUNK_BYTES


def test_empty_lines_without_end_are_refused() -> None:
    file = Endless(b"\n")
    with pytest.raises(BadLine, match="empty, and so are those after it"):
        list(blocks(file))
    assert file.num_read <= BLANK_BYTES_MAX + 2 * CHUNK_BYTES


def test_values_are_shown_in_one_line() -> None:
    assert shown(b"a\nb") == r"'a\nb'"
    assert shown(b"\xff\x00") == r"'\xff\x00'"
    assert len(shown(b"x" * 1000)) == len(shown("x" * 1000)) == len(shown([1] * 1000)) == 61
