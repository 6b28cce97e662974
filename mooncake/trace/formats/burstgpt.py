"""BurstGPT: Timestamp in seconds, Model, Request tokens, Response tokens, Total tokens, Log Type; newer files have Session ID
and Elapsed time too. A request without response tokens failed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from mooncake.core.types import NANOS_PER_S
from mooncake.trace.formats import columns
from mooncake.trace.formats.base import SECONDS_MAX
from mooncake.trace.lines import BadLine, lines_of, shown
from mooncake.trace.types import TraceFormat, TraceRequest

_COLUMNS = (b"Timestamp", b"Request tokens", b"Response tokens")
_SESSION = b"Session ID"
_SECONDS = re.compile(rb"(\d{1,10})(?:\.(\d{1,9})\d*)?")


class BurstGpt:
    format = TraceFormat("burstgpt", None)
    num_header_lines = 1

    def claims(self, line: bytes) -> bool:
        return set(_COLUMNS) <= set(columns.names_of(line))

    def is_synthetic(self, line: bytes) -> bool:
        return False

    def parse(self, runs: Iterable[bytes]) -> Iterator[TraceRequest | None]:
        lines = lines_of(runs)
        header = next(lines, b"")
        num_columns = len(columns.names_of(header))
        at, input_at, output_at = columns.places(header, *_COLUMNS)
        session_at = columns.places(header, _SESSION)[0] if _SESSION in columns.names_of(header) else None
        zero: int | None = None
        for line in lines:
            fields = columns.fields_of(line, num_columns)
            arrival = _nanos(fields[at], line)
            if zero is None:
                zero = arrival
            output_length = columns.tokens(fields[output_at], "Response tokens", 0, line)
            if not output_length:  # failed requests may have no input either
                yield None
                continue
            input_length = columns.tokens(fields[input_at], "Request tokens", 1, line)
            session = fields[session_at].decode("utf-8", "replace") or None if session_at is not None else None
            yield TraceRequest(arrival - zero, input_length, output_length, None, session)


def _nanos(text: bytes, line: bytes) -> int:
    found = _SECONDS.fullmatch(text)
    if found is None or int(found[1]) > SECONDS_MAX:
        raise BadLine(f"Timestamp = {shown(text)}: expected seconds, from 0 to {SECONDS_MAX}", line)
    return int(found[1]) * NANOS_PER_S + int((found[2] or b"").ljust(9, b"0"))
