"""The report of a replay as one page: no network, no script, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.plan.replay_text import admission, pools
from mooncake.plan.svg import (
    Mark,
    Plot,
    duration_label,
    linear,
    logarithmic,
    percent_label,
    strip,
    time_label,
    time_scale,
)
from mooncake.plan.tables import count, duration, number, objective, share, size
from mooncake.sim.collect import TIERS, Column, Gaps
from mooncake.sim.replay import Replay
from mooncake.sim.report import Distribution, Report
from mooncake.sim.samples import InstanceSeries, LinkSeries

_CURVE_POINTS = 160
_LABEL_ROOM = 2.0
"""To the right of a curve, as a factor: the last percentile has its label there."""
_TIER_NAMES = {
    "hbm": "own pages (HBM)",
    "dram_local": "own machine (DRAM)",
    "dram_remote": "other machine (DRAM)",
    "ssd": "SSD",
}
_TIER_STYLES = dict(zip(TIERS, ("c1", "c2", "c3", "c4"), strict=True))
_COUNT_MIN = 5
"""Of an axis of counts: its ticks are whole numbers."""
_LINK_NAMES = {"memory": "memory and host to GPU, share of time", "out": "network out", "in": "network in"}
_ROLE_STYLES = {"prefill": "c1", "decode": "c3", "colocated": "c4"}
_ENDINGS = {"effective": "effective", "late": "missed an objective", "rejected": "rejected", "failed": "failed"}
_ENDING_STYLES = {"effective": "c2", "late": "c4", "rejected": "c5", "failed": "c6"}

STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1d2327;--soft:#667078;--rule:#e3e5e2;--c1:#2f6fd0;--c2:#2a9d83;--c3:#8a63c9;
--c4:#d99a1c;--c5:#d1495b;--c6:#7a8288}
@media (prefers-color-scheme:dark){:root{--paper:#14181b;--card:#1c2125;--ink:#e6e9ea;--soft:#98a2a9;--rule:#30373c;
--c1:#6fa3f2;--c2:#52c7aa;--c3:#b395ec;--c4:#ecb94f;--c5:#f07a89;--c6:#949ea5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;font-weight:650;letter-spacing:-.01em}
h2{font-size:18px;margin:38px 0 12px;font-weight:650}
h3{font-size:14px;margin:0 0 2px;font-weight:600}
p{margin:0 0 8px}
.soft{color:var(--soft)}
.small{font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;margin:22px 0 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;min-width:0}
.tile b{display:block;font-size:25px;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:14px}
svg.plot{width:100%;height:auto;display:block}
.grid{stroke:var(--rule);fill:none}
.axis{stroke:var(--soft);fill:none}
.tick,.note{font-size:11px;fill:var(--soft)}
.note{fill:var(--ink)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.thin{stroke-width:1.2}
.mark{fill:none;stroke:var(--c5);stroke-dasharray:4 3}
.area{stroke:none}
.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}
.line.c5{stroke:var(--c5)}.line.c6{stroke:var(--c6)}
.area.c1,.dot.c1{fill:var(--c1)}.area.c2,.dot.c2{fill:var(--c2)}.area.c3,.dot.c3{fill:var(--c3)}
.area.c4,.dot.c4{fill:var(--c4)}.area.c5,.dot.c5{fill:var(--c5)}.area.c6,.dot.c6{fill:var(--c6)}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft);margin:0 0 6px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px;vertical-align:-1px}
.k1{background:var(--c1)}.k2{background:var(--c2)}.k3{background:var(--c3)}.k4{background:var(--c4)}.k5{background:var(--c5)}
.k6{background:var(--c6)}
.strips{display:grid;gap:3px 14px;align-items:center;font-size:13px;font-variant-numeric:tabular-nums}
.strips .head{color:var(--soft);padding-bottom:3px}
svg.strip{width:100%;height:20px;display:block;background:var(--paper);border-radius:3px}
.span{display:flex;justify-content:space-between;color:var(--soft);font-size:11px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 10px;border-bottom:1px solid var(--rule);text-align:right;font-weight:400;white-space:nowrap}
th{color:var(--soft);font-size:13px}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr:last-child td{border-bottom:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;min-width:0;overflow-wrap:anywhere}
"""


def render(replay: Replay, report: Report) -> str:
    setup = report.setup
    title = f"{setup.trace.path.rpartition('/')[2]} on {pools(setup)}"
    body = "".join(_body(replay, report, title))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _body(replay: Replay, report: Report, title: str) -> Iterator[str]:
    yield from _head(report, title)
    yield "<h2>What users see</h2>"
    yield f'<div class="plots">{"".join(_latency_cards(replay, report))}</div>'
    yield _latency_table(report)
    yield "<h2>Over time</h2>"
    yield f'<div class="plots">{"".join(_time_cards(replay))}</div>'
    yield "<h2>Instances</h2>"
    yield _instances(replay)
    yield "<h2>Links</h2>"
    yield _links(replay)
    yield "<h2>How it was run</h2>"
    yield _setup(report)
    yield "<h2>Definitions</h2>"
    yield _pairs(list(report.definitions.items()))


# ------------------------------------------------------------ head


def _head(report: Report, title: str) -> Iterator[str]:
    setup, service, cost = report.setup, report.service, report.cost
    cluster = setup.cluster
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="soft">{escape(cluster.hardware)}, {escape(cluster.model)}, policy {escape(cluster.policy)}, '
        f"{escape(admission(setup))}; {setup.speed:g} times the trace's speed; simulated by mooncake</p>"
    )
    objectives = f"TTFT {objective(setup.ttft_slo_s)}, TBT {objective(setup.tbt_slo_s)}"
    latency = report.latency
    price = cost.usd_per_million_tokens
    tiles = [
        (share(service.effective_share), f"effective requests; {objectives}"),
        (f"{number(service.goodput_per_s)}/s", "goodput, effective requests"),
        (duration(latency.ttft_ms.p50), f"TTFT p50; p90 {duration(latency.ttft_ms.p90)}"),
        (duration(latency.tbt_ms.p50), f"TBT p50; p90 {duration(latency.tbt_ms.p90)}"),
        (share(report.reuse.hit_rate_by_token), "of input tokens reused"),
        ("-" if price is None else f"${price:,.2f}", "per million effective tokens"),
    ]
    cells = (f'<div class="card tile"><b>{escape(value)}</b><span class="soft small">{escape(text)}</span></div>'
             for value, text in tiles)  # fmt: skip
    yield f'<div class="tiles">{"".join(cells)}</div>'


# ------------------------------------------------------------ latencies


def _latency_cards(replay: Replay, report: Report) -> Iterator[str]:
    collector, setup, latency = replay.collector, report.setup, report.latency
    for name, text, column, found, slo_s in (
        ("TTFT", "share of requests with a first token", collector.ttft, latency.ttft_ms, setup.ttft_slo_s),
        ("TBT", "share of requests with gaps", collector.tbt, latency.tbt_ms, setup.tbt_slo_s),
    ):
        marks = [] if slo_s is None else [Mark(1000 * slo_s, f"objective {objective(slo_s)}")]
        yield _cdf_card(name, text, [(_curve(column), "c1", "")], found, marks)
    curves = [(_curve(collector.itl), "c1", "mean gap of a request"), (_gap_curve(collector.gaps), "c3", "single gaps")]
    yield _cdf_card("ITL", "share of requests, and of all gaps", curves)
    curves = [
        (_curve(collector.placed), "c1", "actual"),
        (_curve(collector.predicted), "c4", "predicted at the placement"),
    ]
    yield _cdf_card("Prefill: predicted and actual TTFT", "share of requests, from the placement on", curves)


Curve = list[tuple[float, float]]
"""(milliseconds, share at or below)."""


def _cdf_card(
    name: str,
    text: str,
    curves: list[tuple[Curve, str, str]],
    found: Distribution | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """found: of the first curve, whose percentiles are shown."""
    points = [x for curve, _, _ in curves for x, _ in curve]
    if not points:
        return _card(name, text, '<p class="soft">Nothing to show.</p>')
    low, high = min(points), max([*points, *(mark.at for mark in marks)])
    plot = Plot(logarithmic(max(low, 0.01), high * _LABEL_ROOM), linear(1.0), duration_label, percent_label)
    for curve, style, _ in curves:
        plot.line(curve, style)
    for level, label in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        at = getattr(found, label, None)
        if at is not None:
            plot.dot(at, level, f"{label} {duration(at)}", curves[0][1])
    for mark in marks:
        plot.mark(mark, "mark")
    keys = [(style, label) for _, style, label in curves if label]
    return _card(name, text, _key(keys) + plot.render(f"distribution of {name}"))


def _curve(column: Column) -> Curve:
    values = column.values()
    ordered = np.sort(values[~np.isnan(values)]) / NANOS_PER_MS
    total = len(ordered)
    places = sorted({min(total - 1, max(0, math.ceil(level * total) - 1)) for level in _levels()}) if total else []
    points = [(round(float(ordered[place]), 4), (place + 1) / total) for place in places]
    return [(points[0][0], 0.0), *points] if points else []


def _gap_curve(gaps: Gaps) -> Curve:
    levels = _levels()
    pairs = zip(gaps.quantiles(levels), levels, strict=True)
    return [(round(value / NANOS_PER_MS, 4), level) for value, level in pairs if value is not None]


def _levels() -> list[float]:
    """Denser towards both ends, where curves bend."""
    half = _CURVE_POINTS // 2
    return [
        *(0.5 * (at / half) ** 2 for at in range(half)),
        *(1 - 0.5 * (1 - at / half) ** 2 for at in range(half + 1)),
    ]


def _latency_table(report: Report) -> str:
    latency = report.latency
    rows: list[tuple[str, Distribution]] = [
        ("TTFT", latency.ttft_ms),
        ("of it network", latency.network_ms),
        ("TBT", latency.tbt_ms),
        ("hand-over gap", latency.handover_ms),
        ("ITL of requests", latency.itl_ms),
        ("gaps, all of them", latency.gap_ms),
        ("latency", latency.latency_ms),
    ]
    cells = [["", "mean", "p50", "p90", "p99", "max"]]
    cells += [[name, *(duration(v) for v in (d.mean, d.p50, d.p90, d.p99, d.max))] for name, d in rows]
    return f'<div class="card scroll" style="margin-top:14px">{_table(cells)}</div>'


# ------------------------------------------------------------ over time


def _time_cards(replay: Replay) -> Iterator[str]:
    step, bins = replay.bin_ns / NANOS_PER_S, _num_bins(replay)
    yield _ending_card(replay, step, bins)
    yield _queue_card(replay, step, _num_whole(replay))
    yield _hit_card(replay, step, bins)
    yield _busy_card(replay, step, _num_whole(replay))


def _num_bins(replay: Replay) -> int:
    """The last one may be a part."""
    return max(1, math.ceil(replay.duration_ns / replay.bin_ns))


def _num_whole(replay: Replay) -> int:
    return max(1, replay.duration_ns // replay.bin_ns)


def _over(replay: Replay, what: str, bins: int) -> list[int]:
    counts: Mapping[int, int] = replay.collector.over_time.get(what, {})
    return [counts.get(at, 0) for at in range(bins)]


def _time_plot(step: float, bins: int, high: float = 1.0, *, shares: bool = False) -> Plot:
    to_text, title = time_label(step * bins)
    if shares:
        return Plot(time_scale(step * bins), linear(1.0), to_text, percent_label, title)
    return Plot(time_scale(step * bins), linear(max(high, _COUNT_MIN)), to_text, lambda value: f"{value:,g}", title)


def _ending_card(replay: Replay, step: float, bins: int) -> str:
    series = {what: _over(replay, what, bins) for what in _ENDINGS}
    shown = {what: counts for what, counts in series.items() if any(counts)}
    totals = [sum(column) for column in zip(*series.values(), strict=True)]
    arrived = _over(replay, "arrived", bins)
    plot = _time_plot(step, bins, max([*totals, *arrived]))
    bottoms = [0] * bins
    for what, counts in shown.items():
        plot.bars(bottoms, [(at * step, value) for at, value in enumerate(counts)], step, _ENDING_STYLES[what])
        bottoms = [below + value for below, value in zip(bottoms, counts, strict=True)]
    plot.line([((at + 0.5) * step, value) for at, value in enumerate(arrived)], "c1 thin")
    keys = [("c1", "arrived"), *((_ENDING_STYLES[what], f"{_ENDINGS[what]} ({sum(shown[what]):,})") for what in shown)]
    return _card(
        "Requests and rejections", f"by how they ended, in each {step:g} s", _key(keys) + plot.render("requests")
    )


def _queue_card(replay: Replay, step: float, bins: int) -> str:
    roles = list(dict.fromkeys(series.role for series in replay.load))
    totals = {role: _summed([series.waiting for series in replay.load if series.role == role], bins) for role in roles}
    plot = _time_plot(step, bins, max((max(values) for values in totals.values()), default=0))
    for role, values in totals.items():
        plot.line([((at + 1) * step, value) for at, value in enumerate(values)], f"{_ROLE_STYLES[role]} thin")
    keys = [(_ROLE_STYLES[role], f"{role} (at most {max(values):,})") for role, values in totals.items()]
    return _card(
        "Queue", "requests waiting, all instances of a pool together", _key(keys) + plot.render("queue length")
    )


def _hit_card(replay: Replay, step: float, bins: int) -> str:
    inputs = _over(replay, "input", bins)
    lower = [0.0] * bins
    plot = _time_plot(step, bins, shares=True)
    for tier in TIERS:
        tokens = _over(replay, tier, bins)
        upper = [low + (part / whole if whole else 0.0)
                 for low, part, whole in zip(lower, tokens, inputs, strict=True)]  # fmt: skip
        places = [(at + 0.5) * step for at in range(bins)]
        plot.area(list(zip(places, lower, strict=True)), list(zip(places, upper, strict=True)), _TIER_STYLES[tier])
        lower = upper
    total = sum(inputs) or 1
    keys = [
        (_TIER_STYLES[tier], f"{_TIER_NAMES[tier]} {share(replay.collector.total(tier) / total)}") for tier in TIERS
    ]
    return _card("Hit rate by tier", "share of input tokens, by time of arrival", _key(keys) + plot.render("hit rate"))


def _busy_card(replay: Replay, step: float, bins: int) -> str:
    roles = list(dict.fromkeys(series.role for series in replay.load))
    plot = _time_plot(step, bins, shares=True)
    keys = []
    for role in roles:
        pool = [series.busy for series in replay.load if series.role == role]
        means = [value / len(pool) for value in _summed(pool, bins)]
        plot.line([((at + 0.5) * step, value) for at, value in enumerate(means)], f"{_ROLE_STYLES[role]} thin")
        keys.append((_ROLE_STYLES[role], f"{role} {share(sum(means) / bins)}"))
    return _card("Load of the pools", "share of time computing, mean of the pool", _key(keys) + plot.render("load"))


def _summed(series: Sequence[Sequence[float]], bins: int) -> list[float]:
    padded = ([*values[:bins], *[0] * (bins - len(values))] for values in series)
    return [sum(column) for column in zip(*padded, strict=True)] if series else [0] * bins


# ------------------------------------------------------------ strips


def _instances(replay: Replay) -> str:
    bins, span_s = _num_whole(replay), replay.duration_ns / NANOS_PER_S
    roles = dict.fromkeys(series.role for series in replay.load)
    running = {role: max(max(s.running, default=0) for s in replay.load if s.role == role) or 1 for role in roles}
    kv = max(max(series.kv, default=0.0) for series in replay.load) or 1.0
    scales = ", ".join(f"{role} up to {value}" for role, value in running.items())
    heads = ("", "computing, share of time", f"sequences running ({scales})", f"KV room in use (up to {share(kv)})")
    rows = [cell for series in replay.load for cell in _instance_cells(series, bins, running[series.role], kv)]
    return _strip_card(heads, rows, span_s)


def _instance_cells(series: InstanceSeries, bins: int, most_running: int, most_kv: float) -> Iterator[str]:
    style = _ROLE_STYLES[series.role]
    busy, running, kv = series.busy[:bins], series.running[:bins], series.kv[:bins]
    name = f"{series.name}, {series.node}"
    sequences = f"{_mean(running):.1f} sequences on average, {max(running, default=0)} at most"
    room = f"KV room {share(_mean(kv))} in use on average, {share(max(kv, default=0.0))} at most"
    yield escape(series.name)
    yield strip(busy, 1.0, style, f"{name}: computing {share(_mean(busy))} of the time")
    yield strip(running, most_running, style, f"{name}: {sequences}")
    yield strip(kv, most_kv, style, f"{name}: {room}")


def _links(replay: Replay) -> str:
    """A row for each node, a column for each kind of link over which anything went."""
    bins, span_s = _num_whole(replay), replay.duration_ns / NANOS_PER_S
    used = [link for link in replay.links if link.num_bytes]
    if not used:
        return '<p class="soft">No bytes were moved.</p>'
    by_name = {link.name: link for link in replay.links}
    nodes = dict.fromkeys(link.name.partition(".")[0] for link in used)
    kinds = [kind for kind in _LINK_NAMES if any(link.name.endswith(f".{kind}") for link in used)]
    most = {kind: max(max(link.use, default=0.0) for link in used if link.name.endswith(f".{kind}")) for kind in kinds}
    cells = []
    for node in nodes:
        cells.append(escape(node))
        cells += [_link_cell(by_name[f"{node}.{kind}"], bins, most[kind]) for kind in kinds]
    return _strip_card(["", *(f"{_LINK_NAMES[kind]} (up to {share(most[kind])})" for kind in kinds)], cells, span_s)


def _link_cell(link: LinkSeries, bins: int, most: float) -> str:
    use = link.use[:bins]
    text = f"{link.name}: {size(link.num_bytes)} at up to {size(link.bytes_per_s)}/s, in use {share(_mean(use))} of the time"
    return strip(use, most, "c2", text)


def _strip_card(heads: Sequence[str], cells: Sequence[str], span_s: float) -> str:
    label, unit = time_label(span_s)
    end = label(round(span_s / 60) * 60 if unit == "minutes" else round(span_s))
    axis = f'<div class="span"><span>0</span><span>{end} {unit}</span></div>'
    head = "".join(f'<div class="head">{escape(text)}</div>' for text in heads)
    body = "".join(f"<div>{cell}</div>" for cell in cells)
    columns = len(heads) - 1
    style = f"grid-template-columns:max-content repeat({columns},1fr)"
    return f'<div class="card"><div class="strips" style="{style}">{head}{body}<div></div>{axis * columns}</div></div>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------------------ text


def _setup(report: Report) -> str:
    setup, requests, cost = report.setup, report.requests, report.cost
    trace, cluster = setup.trace, setup.cluster
    outcomes = ", ".join(f"{outcome} {value:,}" for outcome, value in requests.outcomes.items())
    room = f"KV room of {count(cluster.kv_tokens_per_instance)} tokens"
    steps = f"steps of up to {count(cluster.max_step_tokens)} prefill tokens, {cluster.max_batch} sequences decoding"
    ssd = ""
    if cluster.ssd_bytes_per_node:
        ssd = f" and {size(cluster.ssd_bytes_per_node)} of SSD at {size(cluster.ssd_bytes_per_s)}/s"
    rates = f"network {size(cluster.nic_bytes_per_s)}/s, host to GPU {size(cluster.host_bytes_per_s)}/s"
    price = f" at ${cost.usd_per_gpu_hour:.2f}" if cost.usd_per_gpu_hour is not None else ""
    pairs = [
        (
            "trace",
            f"{trace.path}, {trace.format} format, {count(trace.num_requests)} requests in {trace.span_s:,.0f} s",
        ),
        ("requests", f"{count(requests.total)}: {outcomes}; {requests.unfinished} unfinished"),
        ("each instance", f"{room}, {steps}"),
        ("each node", f"store of {size(cluster.store_bytes_per_node)} ({cluster.eviction}){ssd}, {rates}"),
        ("blocks", f"{cluster.block_tokens} tokens"),
        ("seed", str(setup.seed)),
        ("cost", f"{cost.gpu_hours:,.1f} GPU-hours of {cost.num_gpus} GPUs{price}"),
    ]
    return _pairs([*pairs, *(("note", note) for note in setup.notes)])


def _card(name: str, text: str, inside: str) -> str:
    return f'<div class="card"><h3>{escape(name)}</h3><p class="soft small">{escape(text)}</p>{inside}</div>'


def _key(entries: Sequence[tuple[str, str]]) -> str:
    if not entries:
        return ""
    items = "".join(f'<span><i class="k{style[1]}"></i>{escape(text)}</span>' for style, text in entries)
    return f'<div class="key">{items}</div>'


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f'<div class="card"><dl>{cells}</dl></div>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in others]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
