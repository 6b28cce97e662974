"""Azure's LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens; the time of day to 100 ns, in UTC."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Iterator

from mooncake.core.types import NANOS_PER_S
from mooncake.trace.formats import columns
from mooncake.trace.lines import BadLine, lines_of, shown
from mooncake.trace.types import TraceFormat, TraceRequest

_COLUMNS = (b"TIMESTAMP", b"ContextTokens", b"GeneratedTokens")
_MINUTE_CHARACTERS = len("2023-11-16 18:15")
_WITHIN_MINUTE = re.compile(rb":([0-5]\d)(?:\.(\d{1,9}))?(?:\+00:00)?")


class Azure:
    format = TraceFormat("azure", None)
    num_header_lines = 1

    def claims(self, line: bytes) -> bool:
        return sorted(columns.names_of(line)) == sorted(_COLUMNS)

    def is_synthetic(self, line: bytes) -> bool:
        return False

    def parse(self, runs: Iterable[bytes]) -> Iterator[TraceRequest | None]:
        lines = lines_of(runs)
        header = next(lines, b"")
        at, input_at, output_at = columns.places(header, *_COLUMNS)
        clock = _Clock()
        zero: int | None = None
        for line in lines:
            fields = columns.fields_of(line, len(_COLUMNS))
            arrival = clock.read(fields[at], line)
            if zero is None:
                zero = arrival
            input_length = columns.tokens(fields[input_at], "ContextTokens", 1, line)
            output_length = columns.tokens(fields[output_at], "GeneratedTokens", 0, line)
            yield TraceRequest(arrival - zero, input_length, output_length) if output_length else None


class _Clock:
    """Reads times of day, a minute once: the lines of a minute follow each other."""

    def __init__(self) -> None:
        self._minute = b""
        self._minute_ns = 0

    def read(self, text: bytes, line: bytes) -> int:
        minute = text[:_MINUTE_CHARACTERS]
        within = _WITHIN_MINUTE.fullmatch(text, _MINUTE_CHARACTERS)
        try:
            if minute != self._minute:
                start = dt.datetime.strptime(minute.decode("ascii"), "%Y-%m-%d %H:%M")
                self._minute_ns = round(start.replace(tzinfo=dt.UTC).timestamp()) * NANOS_PER_S
                self._minute = minute
        except ValueError:
            within = None
        if within is None:
            raise BadLine(f"TIMESTAMP = {shown(text)}: expected a time such as 2023-11-16 18:15:46.6805900", line)
        return self._minute_ns + int(within[1]) * NANOS_PER_S + int((within[2] or b"").ljust(9, b"0"))
