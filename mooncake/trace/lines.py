"""Whole lines of a file, compressed or not, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mooncake.core.errors import TraceError

CHUNK_BYTES = 1 << 18
LINE_BYTES_MAX = 16 << 20
"""The longest honest line is a prompt of millions of tokens in blocks of 16, about 1 MB per million. What has no line end for
longer is no trace, and is refused before the rest of it is read."""
BLANK_BYTES_MAX = 1 << 16
"""Of empty lines at the end of a file, which editors leave behind."""
SHOWN_CHARACTERS = 60
"""Of a wrong value, in a message."""

_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


class BadLine(ValueError):
    """Why a line is refused, and the line, as far as the reader of lines has it."""

    def __init__(self, reason: str, line: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's content, decompressed if it needs to be; what goes wrong with the file is a TraceError."""
    try:
        if path.exists() and not path.is_file():
            raise TraceError(f"trace {path}: not a regular file; a trace is read more than once")
        with path.open("rb") as file:
            is_compressed = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_compressed else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceError(f"trace {path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise TraceError(f"trace {path}: {error.strerror or error}") from None


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """Runs of whole lines, of all lines but empty ones at the end; the last line of a run has no line end. Raises BadLine for
    the line that follows those already given."""
    rest = blank = b""
    is_first = True
    for chunk in _chunks(file):
        lines, end, rest = (rest + chunk).rpartition(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            raise BadLine(f"longer than {LINE_BYTES_MAX >> 20} MiB")
        lines += end
        if is_first and lines:
            lines, is_first = lines.removeprefix(_BYTE_ORDER_MARK), False
        filled = len(lines.rstrip(_BLANK))
        if filled:
            end_of_last = lines.index(b"\n", filled)
            yield blank + lines[:end_of_last]
            lines, blank = lines[end_of_last + 1 :], b""
        blank += lines
        if len(blank) > BLANK_BYTES_MAX:
            raise BadLine("empty, and so are those after it")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
    yield b"\n"  # the last line may have no end of its own


def lines_of(runs: Iterable[bytes]) -> Iterator[bytes]:
    for run in runs:
        yield from run.split(b"\n")


def shown(value: object) -> str:
    """A value in a message, cut off where it is long. Bytes look like text where they are."""
    if isinstance(value, bytes):
        try:
            value = value[: 4 * SHOWN_CHARACTERS].decode()
        except UnicodeDecodeError:
            return _cut(repr(value[:SHOWN_CHARACTERS])[1:])
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
