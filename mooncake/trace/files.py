"""Trace files: what they are, whether they are sound, what is in them.

A reader streams: it holds one run of lines at a time, so a trace may be longer than memory. What is wrong with a file is a
TraceError of one sentence with file, line and reason. `check_trace` goes through a whole file, so that what uses it afterwards
meets no surprise half-way.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from mooncake.core.errors import TraceError
from mooncake.core.types import NANOS_PER_S
from mooncake.trace.formats import FORMATS, WRITABLE, Format, claimant
from mooncake.trace.lines import BadLine, blocks, lines_of, opened, shown
from mooncake.trace.types import TraceFormat, TraceInfo, TraceRequest, TraceSummary


class TraceReader:
    """Requests in the order of the file, once. num_skipped: failed requests so far, which are left out."""

    def __init__(self, info: TraceInfo, parser: Format) -> None:
        self.info = info
        self.num_skipped = 0
        self._parser = parser
        self._requests = self._read()

    def __iter__(self) -> Iterator[TraceRequest]:
        return self._requests

    def __next__(self) -> TraceRequest:
        return next(self._requests)

    def _read(self) -> Iterator[TraceRequest]:
        line = self._parser.num_header_lines
        latest = 0
        try:
            with opened(Path(self.info.path)) as file:
                for request in self._parser.parse(blocks(file)):
                    line += 1
                    if request is None:
                        self.num_skipped += 1
                        continue
                    if request.arrival_ns < latest:
                        back_s = (latest - request.arrival_ns) / NANOS_PER_S
                        raise self._error(line, f"its timestamp is {back_s:g} s before that of an earlier line")
                    latest = request.arrival_ns
                    yield request
        except BadLine as error:
            raise self._error(line + 1, self._reason(error)) from None

    def _reason(self, error: BadLine) -> str:
        other = claimant(error.line) if error.line else None
        if other is None or (other is self._parser and not other.num_header_lines):
            return error.reason
        if other is self._parser:
            return "a header again, as if several files were joined"
        return f"a line of the {other.format.name} format, and the trace is {self._parser.format.name}"

    def _error(self, line: int, reason: str) -> TraceError:
        return TraceError(f"trace {self.info.path}, line {line}: {reason}")


def detect(path: str | Path) -> TraceFormat:
    """The format of a trace, by its first line."""
    return open_trace(path).info.format


def open_trace(path: str | Path, format: str | None = None) -> TraceReader:  # noqa: A002
    """Looks at the first line only; the rest is read, and found bad or not, by iterating."""
    if format is not None and format not in FORMATS:
        raise TraceError(f"trace format {format!r}: not known; there are {', '.join(FORMATS)}")
    first = _first_line(Path(path))
    parser = claimant(first) if format is None else FORMATS[format]
    if parser is None or not parser.claims(first):
        wanted = f"no {format} trace" if format else f"no trace of a known format ({', '.join(FORMATS)})"
        raise TraceError(f"trace {path}, line 1: {shown(first)} begins {wanted}")
    return TraceReader(TraceInfo(str(path), parser.format, parser.is_synthetic(first)), parser)


def check_trace(path: str | Path, format: str | None = None) -> TraceSummary:  # noqa: A002
    """Reads all of it. Raises TraceError for the first thing that is wrong, and for a trace without requests."""
    reader = open_trace(path, format)
    num_requests = input_tokens = output_tokens = span_ns = 0
    for request in reader:
        if not num_requests:
            first_ns = request.arrival_ns
        num_requests += 1
        input_tokens += request.input_length
        output_tokens += request.output_length
        span_ns = request.arrival_ns - first_ns
    if not num_requests:
        raise TraceError(f"trace {path}: {no_requests(reader.num_skipped)}")
    return TraceSummary(reader.info, num_requests, reader.num_skipped, span_ns, input_tokens, output_tokens)


def no_requests(num_skipped: int) -> str:
    return f"all requests failed ({num_skipped}), without output tokens" if num_skipped else "no requests"


def write_trace(
    path: str | Path,
    requests: Iterable[TraceRequest],
    format: str = "mooncake",  # noqa: A002
    *,
    synthetic: bool = False,
) -> int:
    """Gives the number of requests. A file that is there already is replaced, at once and only when all is written. Compressed
    if the name ends with .gz; equal requests make equal files."""
    writer, path = WRITABLE[format], Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    number = 0
    try:
        with (
            partial.open("wb") as raw,
            _compressed(raw) if path.suffix == ".gz" else contextlib.nullcontext(raw) as file,
        ):
            for request in requests:
                number += 1
                file.write(writer.encode(request, number, synthetic=synthetic) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise TraceError(f"trace {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return number


def _compressed(raw: BinaryIO) -> gzip.GzipFile:
    return gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0)


def _first_line(path: Path) -> bytes:
    try:
        with opened(path) as file:
            first = next(lines_of(blocks(file)), None)
    except BadLine as error:
        raise TraceError(f"trace {path}, line 1: {error.reason}") from None
    if first is None:
        raise TraceError(f"trace {path}: empty")
    return first
