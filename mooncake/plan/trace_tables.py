"""The reports on traces as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mooncake.plan.tables import count, number, table
from mooncake.plan.trace_report import BELADY, HitRateReport, HitRateRow, StatsReport, SynthReport
from mooncake.trace.stats import Arrivals, Lengths, Reuse, TraceStats
from mooncake.trace.types import TraceInfo

_HIT_RATE_NOTE = "one global cache, order of requests only, reuse stops at the first miss; cold start included"
_BELADY_NOTE = (
    "* a bound: the tokens of as many blocks as the best choice with knowledge of the future reuses, block by block"
)


def stats_text(report: StatsReport) -> str:
    stats, lines = report.stats, [_title(report.trace)]
    if report.num_skipped:
        lines.append(f"{report.num_skipped:,} failed requests, without output tokens, are left out")
    lines += ["", *table(_general_rows(stats)), "", *table(_length_rows(stats))]
    if stats.reuse is None:
        lines += ["", f"reuse: unknown, the {report.trace.format.name} format says nothing of prefixes"]
        return "\n".join(lines)
    lines += ["", *_reuse_lines(stats.reuse), ""]
    if report.hit_rates:
        lines += _hit_rate_lines(report.hit_rates, report.trace)
    else:
        lines.append(f"hit rates by capacity: mooncake trace hit-rate {report.trace.path}")
    return "\n".join(lines)


def hit_rate_text(report: HitRateReport) -> str:
    title = f"{_title(report.trace)}, {report.num_requests:,} requests"
    return "\n".join((title, "", *_hit_rate_lines(report.hit_rates, report.trace)))


def synth_text(report: SynthReport) -> str:
    lines = [f"wrote {report.trace.path}: {report.trace.format.name} format, seed {report.options.seed}"]
    lines += [f"shared prefixes: {report.sharing}", ""]
    if report.source_trace is None:
        lines += table([["", "asked", "synthetic"], *_asked_rows(report)])
    else:
        pairs = zip(_compared(report.source), _compared(report.synthetic), strict=True)
        rows = [[name, of_source, made] for (name, of_source), (_, made) in pairs]
        lines += table([["", "source", "synthetic"], *rows])
    if report.lru:
        rows = [[count(row.capacity_blocks), _share(row.source), _share(row.synthetic)] for row in report.lru]
        lines += ["", "hit rate by token, LRU", *table([["blocks", "source", "synthetic"], *rows])]
    return "\n".join(lines)


# ------------------------------------------------------------ parts


def _title(info: TraceInfo) -> str:
    blocks = f", blocks of {info.format.block_tokens} tokens" if info.format.block_tokens else ""
    made = ", synthetic: made by mooncake trace synth" if info.synthetic else ""
    return f"{info.path}: {info.format.name} format{blocks}{made}"


def _general_rows(stats: TraceStats) -> Iterator[list[str]]:
    arrivals = stats.arrivals
    yield ["requests", count(stats.num_requests)]
    yield ["span", f"{arrivals.span_s:,.1f} s"]
    yield ["requests per second", number(arrivals.requests_per_s)]
    yield ["input tokens per second", number(arrivals.input_tokens_per_s)]
    yield ["output tokens per second", number(arrivals.output_tokens_per_s)]
    yield from _burst_rows(arrivals)


def _burst_rows(arrivals: Arrivals) -> Iterator[list[str]]:
    yield ["cv of gaps (Poisson: 1)", number(arrivals.cv)]
    yield ["variance over mean per minute (Poisson: 1)", number(arrivals.minute_dispersion)]
    yield ["most requests within a second", count(arrivals.peak_per_s)]
    yield ["most requests at once", count(arrivals.peak_at_once)]
    yield ["clock", f"steps of {arrivals.step_s:g} s" if arrivals.step_s is not None else "fine"]


def _length_rows(stats: TraceStats) -> Iterator[list[str]]:
    yield ["tokens", "mean", "p50", "p90", "p99", "max", "total"]
    for name, lengths in (("input", stats.input_length), ("output", stats.output_length)):
        yield [name, *_length_cells(lengths), count(lengths.total)]


def _length_cells(lengths: Lengths) -> list[str]:
    return [number(lengths.mean), *map(count, (lengths.p50, lengths.p90, lengths.p99, lengths.max))]


def _reuse_lines(reuse: Reuse) -> Iterator[str]:
    part = "" if reuse.is_complete else f", of the first {reuse.num_requests:,} requests: there are too many blocks"
    yield f"reuse, in a cache that never evicts{part}"
    yield from table(
        [
            ["blocks, references to them", f"{reuse.num_blocks:,}, {reuse.num_references:,}"],
            ["blocks used once", _share(reuse.single_use_share)],
            ["requests with the most shared block", count(reuse.most_shared)],
            ["hit rate by token", _share(reuse.hit_rate_by_token)],
            ["hit rate by block", _share(reuse.hit_rate_by_block)],
            ["hit rate, mean of requests", _share(reuse.hit_rate_per_request)],
        ]
    )
    yield ""
    rows = [[count(depth.depth), _share(depth.share_hit), _share(depth.share_long)] for depth in reuse.by_depth]
    yield from table([["blocks, at least", "requests that reuse so many", "that have so many"], *rows])


def _hit_rate_lines(rows: Sequence[HitRateRow], info: TraceInfo) -> Iterator[str]:
    assert info.format.block_tokens is not None
    policies = list(dict.fromkeys(row.policy for row in rows))
    yield f"hit rate by token: {_HIT_RATE_NOTE}"
    cells = [["blocks", "tokens", *(f"{name}*" if name == BELADY else name for name in policies)]]
    for at in range(0, len(rows), len(policies)):
        of_size = rows[at : at + len(policies)]
        size = of_size[0].capacity_blocks
        sizes = ["no limit", ""] if size is None else [count(size), count(size * info.format.block_tokens)]
        cells.append([*sizes, *(_share(row.by_token) for row in of_size)])
    yield from table(cells)
    if BELADY in policies:
        yield _BELADY_NOTE


def _compared(stats: TraceStats | None) -> Iterator[tuple[str, str]]:
    assert stats is not None
    reuse = stats.reuse
    yield from ((row[0], row[1]) for row in _general_rows(stats))
    for name, lengths in (("input", stats.input_length), ("output", stats.output_length)):
        for kind, cell in zip(("mean", "p50", "p90", "p99", "max"), _length_cells(lengths), strict=True):
            yield f"{name} tokens, {kind}", cell
    yield "blocks", count(reuse.num_blocks) if reuse is not None else "unknown"
    yield "blocks used once", _share(reuse.single_use_share if reuse is not None else None)
    yield "requests with the most shared block", count(reuse.most_shared) if reuse is not None else "unknown"
    yield "hit rate by token, no limit", _share(reuse.hit_rate_by_token if reuse is not None else None)


def _asked_rows(report: SynthReport) -> Iterator[list[str]]:
    options = report.options
    asked = {
        "requests": options.requests,
        "requests per second": options.rate,
        "cv of gaps (Poisson: 1)": options.cv,
        "input tokens, mean": options.input_mean,
        "output tokens, mean": options.output_mean,
        "hit rate by token, no limit": options.hit_rate,
    }
    for name, made in _compared(report.synthetic):
        value = asked.get(name)
        yield [name, f"{value:,g}" if value is not None else "", made]


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
