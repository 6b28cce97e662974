"""What formats of comma-separated values have in common. Fields are never quoted."""

from __future__ import annotations

from mooncake.trace.lines import BadLine, shown
from mooncake.trace.types import TOKENS_MAX


def names_of(line: bytes) -> list[bytes]:
    return [name.strip() for name in line.split(b",")]


def places(header: bytes, *names: bytes) -> list[int]:
    """Where these columns are."""
    return [names_of(header).index(name) for name in names]


def fields_of(line: bytes, count: int) -> list[bytes]:
    fields = line.rstrip(b"\r").split(b",")
    if len(fields) != count:
        reason = f"{len(fields)} fields, and the header has {count}" if line.strip() else "empty"
        raise BadLine(reason, line)
    return fields


def tokens(field: bytes, name: str, lowest: int, line: bytes) -> int:
    """A count of tokens, in digits only."""
    count = int(field) if field.isdigit() and len(field) <= len(str(TOKENS_MAX)) else -1
    if not lowest <= count <= TOKENS_MAX:
        raise BadLine(f"{name} = {shown(field)}: expected a whole number from {lowest} to {TOKENS_MAX}", line)
    return count
