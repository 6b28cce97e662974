"""The shape that all formats share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from mooncake.trace.types import TraceFormat, TraceRequest

SECONDS_MAX = 3_000_000_000
"""Of a timestamp: Unix time reaches it in 2065, and in nanoseconds it fits 64 bits."""


class Format(Protocol):
    format: TraceFormat
    num_header_lines: int

    def claims(self, line: bytes) -> bool:
        """Whether a trace of this format may begin with this line."""
        ...

    def is_synthetic(self, line: bytes) -> bool:
        """Whether the trace that begins with this line says that it was made up."""
        ...

    def parse(self, runs: Iterable[bytes]) -> Iterator[TraceRequest | None]:
        """One item for every line after the header, None for a request that failed. That arrivals are in order is not its
        business. Raises BadLine for the line that follows those already given."""
        ...


class WritableFormat(Format, Protocol):
    def encode(self, request: TraceRequest, number: int, *, synthetic: bool) -> bytes:
        """The line of the `number`th request, without its end. The request must have hash ids."""
        ...
