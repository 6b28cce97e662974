"""`mooncake reproduce fast25`: the paper's figures from the traces that are there, published beside simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from mooncake.core.errors import ConfigError
from mooncake.plan.fast25_figures import FIGURES
from mooncake.plan.fast25_lab import ABSENT, NOT_RUN, Lab, Row
from mooncake.plan.fast25_parameters import PARAMETERS, Parameters, assumptions
from mooncake.plan.tables import table


class Reproduction(msgspec.Struct, frozen=True):
    """limit: requests of each trace that were run; None: all."""

    limit: int | None
    parameters: Parameters
    assumptions: list[str]
    rows: list[Row]


def figure_names(text: str | None) -> list[str]:
    """From a list with commas; all without one. Raises ConfigError."""
    names = list(FIGURES) if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ConfigError(f"only = {text!r} (--only): no figure {unknown[0]}; there are {', '.join(FIGURES)}")
    return names


def reproduce(folder: str, only: str | None, *, quick: bool, say: Callable[[str], object]) -> Reproduction:
    """Raises ConfigError and TraceError before anything runs."""
    names = figure_names(only)
    limit = PARAMETERS.quick_requests if quick else None
    lab = Lab(Path(folder), PARAMETERS, limit, say)
    lab.check()
    rows = [row for name in names for row in FIGURES[name](lab)]
    return Reproduction(limit, PARAMETERS, assumptions(PARAMETERS), rows)


def write_json(path: str, rows: Sequence[Row]) -> None:
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} (--json): {error.strerror}") from None


def reproduction_text(found: Reproduction) -> str:
    lines = ["The figures of the Mooncake paper (FAST'25), published and simulated.", ""]
    if found.limit is not None:
        lines += [
            f"QUICK: only the first {found.limit:,} requests of each trace, so no figure is that of the paper.",
            "",
        ]
    lines += ["assumptions, the same for all figures", *(f"  {text}" for text in found.assumptions)]
    for figure in dict.fromkeys(row.figure for row in found.rows):
        rows = [row for row in found.rows if row.figure == figure]
        lines += ["", f"{figure}: {_title(figure)}", *table([_HEAD, *map(_cells, rows)]), *_notes(rows)]
    return "\n".join(lines)


_HEAD = ["", "published", "simulated", "deviation", ""]


def _title(figure: str) -> str:
    return (FIGURES[figure].__doc__ or "").partition("\n")[0].rstrip(".")


def _cells(row: Row) -> list[str]:
    simulated = row.status if row.status in (ABSENT, NOT_RUN) else render(row.simulated, row.unit)
    deviation = "" if row.deviation is None else f"{100 * row.deviation:+.1f} %"
    mark = "*" if row.note else ""
    return [row.row, render(row.published, row.unit), simulated, deviation, mark]


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Each once, with the rows that it is about."""
    for note in dict.fromkeys(row.note for row in rows if row.note):
        about = [row.row for row in rows if row.note == note]
        yield f"  * {note}: {about[0] if len(about) == 1 else f'{len(about)} rows, from {about[0]}'}"


def render(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    match unit:
        case "share":
            return f"{100 * value:.1f} %"
        case "gain":
            return f"{100 * value:+.0f} %"
        case "ratio":
            return f"{value:.2f} x"
        case "requests":
            return f"{value:,.0f}"
        case _:
            return f"{value:.3g} {unit}".rstrip()
