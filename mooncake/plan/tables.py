"""Tables and numbers as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    listed = [list(row) for row in rows]
    widths = [max(len(row[at]) for row in listed) for at in range(len(listed[0]))]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(to) for cell, to in zip(row[1:], widths[1:], strict=True))])
        for row in listed
    ]


def count(value: int) -> str:
    return f"{value:,}"


def number(value: float | None) -> str:
    """Four digits; - for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def duration(milliseconds: float | None) -> str:
    """In milliseconds below one second, else in seconds."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds / 1000:.3g} s" if milliseconds >= 999.5 else f"{milliseconds:.3g} ms"


def size(num_bytes: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:,.0f} B"


def objective(seconds: float | None) -> str:
    return "none" if seconds is None else duration(1000 * seconds)
