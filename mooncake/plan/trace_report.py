"""What the `mooncake trace` commands find out, as values that `trace_tables` prints and JSON carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from mooncake.core.errors import ConfigError, TraceError
from mooncake.sim.hit_rate import REFERENCES_MAX as FUTURE_MAX
from mooncake.sim.hit_rate import Future, HitRate, hit_rate
from mooncake.store.eviction import POLICIES
from mooncake.trace.files import no_requests, open_trace, write_trace
from mooncake.trace.options import SynthOptions, number_of
from mooncake.trace.stats import Reuse, TraceStats, trace_stats
from mooncake.trace.synth import SOURCE_REQUESTS_MAX, Source, read_source, synthesise, written_format
from mooncake.trace.types import TraceInfo, TraceRequest

CAPACITIES = (1_000, 3_000, 10_000, 30_000, 100_000)
"""Blocks, where none are given; those that hold the whole trace are left out."""
BELADY = "belady"
POLICY_NAMES = (*POLICIES, BELADY)
REFERENCES_MAX = 1_000_000
"""Blocks of a trace whose hit rates come with its statistics; they take some 10 s. For longer ones there is a command."""
CAPACITY_MAX = 1 << 50
"""Tokens or blocks: more than any storage holds."""


class HitRateRow(msgspec.Struct, frozen=True):
    """capacity_blocks: None for a cache that never evicts. Of Belady's bound, which counts blocks, by_token is what no policy
    exceeds: the tokens of as many whole blocks, but no more than a cache that never evicts reuses. per_request: None for it."""

    capacity_blocks: int | None
    policy: str
    by_token: float
    by_block: float
    per_request: float | None


class StatsReport(msgspec.Struct, frozen=True):
    """hit_rates: empty where the trace has no prefixes, or too many blocks."""

    trace: TraceInfo
    num_skipped: int
    stats: TraceStats
    hit_rates: list[HitRateRow]


class HitRateReport(msgspec.Struct, frozen=True):
    trace: TraceInfo
    num_requests: int
    hit_rates: list[HitRateRow]


class LruRow(msgspec.Struct, frozen=True):
    """By token. source: None where it has no prefixes."""

    capacity_blocks: int
    source: float | None
    synthetic: float


class SynthReport(msgspec.Struct, frozen=True):
    """sharing: where the shared prefixes come from. source: the part of it that the model was made of."""

    trace: TraceInfo
    source_trace: TraceInfo | None
    options: SynthOptions
    sharing: str
    source: TraceStats | None
    synthetic: TraceStats
    lru: list[LruRow]


def stats_report(path: str, trace_format: str | None) -> StatsReport:
    info, num_skipped, stats = _measured(path, trace_format)
    rows: list[HitRateRow] = []
    if stats.reuse is not None and stats.reuse.num_references <= REFERENCES_MAX:
        rows = _hit_rates(_reread(info), info, _default_capacities(stats.reuse), POLICY_NAMES, stats)
    return StatsReport(info, num_skipped, stats, rows)


def hit_rate_report(
    path: str, trace_format: str | None, capacities: str | None, unit: str, policies: str | None
) -> HitRateReport:
    """capacities, policies: lists in text, with commas."""
    named, wanted = _policies(policies), _capacities(capacities)
    info, _, stats = _measured(path, trace_format)
    if info.format.block_tokens is None or stats.reuse is None:
        raise TraceError(
            f"trace {path}: the {info.format.name} format says nothing of prefixes, so nothing can be reused"
        )
    blocks = [size // (info.format.block_tokens if unit == "tokens" else 1) for size in wanted]
    if 0 in blocks:
        raise ConfigError(
            f"capacity = {capacities!r} (--capacity): less than a block, of {info.format.block_tokens} tokens"
        )
    possible = POLICY_NAMES if stats.reuse.num_references <= FUTURE_MAX else tuple(POLICIES)
    sizes = blocks or _default_capacities(stats.reuse)
    rows = _hit_rates(_reread(info), info, sizes, named or possible, stats)
    return HitRateReport(info, stats.num_requests, rows)


def synth_report(path: str | None, trace_format: str | None, out: str, options: SynthOptions) -> SynthReport:
    """Writes the trace, reads it again, and compares it with its source."""
    source_info, source = _source(path, trace_format, out)
    written, _ = written_format(source)
    write_trace(out, synthesise(options, source, np.random.default_rng(options.seed)), written, synthetic=True)
    info, _, synthetic = _measured(out, written)
    compared = source_info if source_info is not None and source_info.format.has_prefixes else None
    assert synthetic.reuse is not None  # what can be written has prefixes
    capacities = _default_capacities(synthetic.reuse)
    of_source = (
        _lru(_reread(compared, SOURCE_REQUESTS_MAX), compared, capacities) if compared else [None] * len(capacities)
    )
    rows = zip(capacities, of_source, _lru(_reread(info), info, capacities), strict=True)
    return SynthReport(
        trace=info,
        source_trace=source_info,
        options=options,
        sharing=_sharing(options, source),
        source=_source_stats(source_info) if source_info is not None else None,
        synthetic=synthetic,
        lru=[LruRow(*row) for row in rows],
    )


def _measured(path: str, trace_format: str | None) -> tuple[TraceInfo, int, TraceStats]:
    reader = open_trace(path, trace_format)
    stats = trace_stats(reader, reader.info.format.block_tokens)
    if stats is None:
        raise TraceError(f"trace {path}: {no_requests(reader.num_skipped)}")
    return reader.info, reader.num_skipped, stats


def _source(path: str | None, trace_format: str | None, out: str) -> tuple[TraceInfo | None, Source | None]:
    if path is None:
        return None, None
    reader = open_trace(path, trace_format)
    if Path(out).exists() and Path(out).samefile(path):
        raise ConfigError(f"out = {out!r} (--out): is the source")
    source = read_source(reader, reader.info.format)
    if source is None:
        raise TraceError(f"trace {path}: {no_requests(reader.num_skipped)}")
    return reader.info, source


def _source_stats(info: TraceInfo) -> TraceStats | None:
    return trace_stats(_reread(info, SOURCE_REQUESTS_MAX)(), info.format.block_tokens)


def _sharing(options: SynthOptions, source: Source | None) -> str:
    has_prefixes = source is not None and source.format.has_prefixes
    if options.hit_rate is not None:
        reason = "made up" if has_prefixes or source is None else f"made up, the {source.format.name} format has none"
        return f"{reason}, to a hit rate of {options.hit_rate:g}"
    return "as in the source" if has_prefixes else "none"


# ------------------------------------------------------------ hit rates

_Requests = Callable[[], Iterable[TraceRequest]]


def _reread(info: TraceInfo, limit: int | None = None) -> _Requests:
    """A trace once per call, from its file: it need not fit into memory."""
    return lambda: islice(open_trace(info.path, info.format.name), limit)


def _hit_rates(
    requests: _Requests, info: TraceInfo, capacities: Sequence[int], policies: Sequence[str], stats: TraceStats
) -> list[HitRateRow]:
    """By capacity, then policy; at last of a cache that never evicts, where the reuse is known of all requests."""
    reuse = stats.reuse
    assert reuse is not None
    future = Future(requests()) if BELADY in policies else None
    rows = []
    for capacity in capacities:
        for policy in policies:
            if future is not None and policy == BELADY:
                rows.append(_bound(future, capacity, info, stats))
            else:
                rate = _replayed(requests, info, policy, capacity)
                rows.append(HitRateRow(capacity, policy, rate.by_token, rate.by_block, rate.per_request))
    for policy in policies if reuse.is_complete else ():
        if policy == BELADY:
            rows.append(HitRateRow(None, policy, reuse.hit_rate_by_token, reuse.hit_rate_by_block, None))
        else:
            rates = reuse.hit_rate_by_token, reuse.hit_rate_by_block, reuse.hit_rate_per_request
            rows.append(HitRateRow(None, policy, *rates))
    return rows


def _bound(future: Future, capacity: int, info: TraceInfo, stats: TraceStats) -> HitRateRow:
    assert info.format.block_tokens is not None and stats.reuse is not None
    by_block = future.belady(capacity)
    by_token = by_block * future.num_references * info.format.block_tokens / stats.input_length.total
    most = stats.reuse.hit_rate_by_token if stats.reuse.is_complete else 1.0
    return HitRateRow(capacity, BELADY, min(by_token, most), by_block, None)


def _lru(requests: _Requests, info: TraceInfo, capacities: Sequence[int]) -> list[float]:
    return [_replayed(requests, info, "lru", capacity).by_token for capacity in capacities]


def _replayed(requests: _Requests, info: TraceInfo, policy: str, capacity: int) -> HitRate:
    assert info.format.block_tokens is not None
    rate = hit_rate(requests(), info.format.block_tokens, POLICIES[policy](), capacity)
    assert rate is not None  # the trace was read before, and has requests
    return rate


def _default_capacities(reuse: Reuse) -> list[int]:
    return [size for size in CAPACITIES if size < reuse.num_blocks]


def _policies(text: str | None) -> list[str]:
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICY_NAMES:
            raise ConfigError(f"policy = {text!r} (--policy): {name!r} is none of {', '.join(POLICY_NAMES)}")
    return names


def _capacities(text: str | None) -> list[int]:
    """1000, 30k or 1.5M, several with commas; in ascending order."""
    found = []
    for part in text.split(",") if text is not None else ():
        size = number_of(part.strip())
        if isinstance(size, str) or not 1 <= size <= CAPACITY_MAX:
            raise ConfigError(f"capacity = {text!r} (--capacity): {part!r} is no count such as 1000, 30k or 1.5M")
        found.append(int(size))
    return sorted(dict.fromkeys(found))
