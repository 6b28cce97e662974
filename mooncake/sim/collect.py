"""What a replay keeps of its requests: a line of each for a file, and of all together some 80 bytes each in columns.

A record is measured when its request has ended and then forgotten. Single gaps between tokens are only counted, in bins whose
width is 1/256 of their size, so that any number of them takes the same memory.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from mooncake.core.stats import TBT_SHARE
from mooncake.core.types import NANOS_PER_MS, CostModel, Job, Slo, Stage
from mooncake.sim.frontend import RequestRecord
from mooncake.sim.node import SimSource
from mooncake.sim.workload import START_NS

TIERS = ("hbm", "dram_local", "dram_remote", "ssd")
"""Where reused tokens came from: the instance's own pages, its machine's memory, another machine's, any machine's SSD."""
NONE = math.nan
"""In a column of times: there is none."""

_GAP_BITS = 15
"""Bits of a float's 23 that tell gaps of one bin apart."""
_GAP_BATCH = 1 << 16


class Reused(msgspec.Struct, frozen=True):
    """Input tokens by where their KV was taken from."""

    hbm: int
    dram_local: int
    dram_remote: int
    ssd: int


class Stages(msgspec.Struct, frozen=True):
    """`mooncake.core.types.Stage`, milliseconds since arrival; None where a request did not come."""

    received: float | None = None
    placed: float | None = None
    prefill_start: float | None = None
    first_token: float | None = None
    kv_ready: float | None = None
    decode_start: float | None = None
    end: float | None = None


class RequestLine(msgspec.Struct, frozen=True):
    """One line of requests.jsonl. Times are milliseconds. ttft_ms contains network_ms, the first token's way to the client;
    predicted_ttft_ms counts from the placement on. handover_ms: the gap after the first token, if another instance decodes."""

    number: int
    arrival_ms: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reused: Reused
    outcome: str
    detail: str
    effective: bool
    ttft_ms: float | None
    network_ms: float | None
    predicted_ttft_ms: float | None
    tbt_ms: float | None
    handover_ms: float | None
    predicted_tbt_ms: float | None
    itl_ms: float | None
    latency_ms: float | None
    prefill: str
    decode: str
    attempts: int
    stages_ms: Stages


class Gaps:
    """All gaps between tokens, counted by size."""

    def __init__(self) -> None:
        self.number = 0
        self.total_ns = 0
        self._bins = np.zeros(0, dtype=np.int64)
        self._batch: list[np.ndarray] = []
        self._num_batched = 0

    def add(self, gaps_ns: np.ndarray) -> None:
        self.number += len(gaps_ns)
        self.total_ns += int(gaps_ns.sum())
        self._batch.append(gaps_ns)
        self._num_batched += len(gaps_ns)
        if self._num_batched >= _GAP_BATCH:
            self._count()

    def quantiles(self, shares: list[float]) -> list[float | None]:
        """Nanoseconds, each the upper end of its bin."""
        self._count()
        if not self.number:
            return [None] * len(shares)
        reached = np.cumsum(self._bins)
        places = np.searchsorted(reached, [max(1, math.ceil(share * self.number)) for share in shares])
        ends = (places.astype(np.uint32) + 1) << _GAP_BITS
        return [float(end) for end in ends.view(np.float32)]

    def _count(self) -> None:
        if not self._batch:
            return
        gaps = np.concatenate(self._batch)
        self._batch, self._num_batched = [], 0
        # Bits of positive floats are in the order of the floats.
        bins = np.bincount(gaps.astype(np.float32).view(np.uint32) >> _GAP_BITS)
        if len(bins) > len(self._bins):
            bins[: len(self._bins)] += self._bins
            self._bins = bins
        else:
            self._bins[: len(bins)] += bins


class Column:
    """Of one number per request, in the order in which they ended."""

    def __init__(self, code: Literal["b", "d", "q"]) -> None:
        self._values: array[Any] = array(code)
        self.append = self._values.append

    def values(self) -> np.ndarray:
        return np.array(self._values)


class Collector:
    """write: takes the encoded line of each request, in the order of arrival; None: nobody wants them. cost: prices the
    prefill that was computed. bin_ns: of what is counted over time."""

    def __init__(self, slo: Slo, cost: CostModel, bin_ns: int, write: Callable[[bytes], object] | None) -> None:
        self.bin_ns = bin_ns
        self.num_ended = 0
        self.num_retries = 0
        self.num_wasted = 0
        """Prefills of requests that were not completed."""
        self.outcomes: Counter[str] = Counter()
        self.gaps = Gaps()
        self.last_ns = START_NS
        self.ttft, self.network, self.tbt, self.itl, self.latency = (Column("d") for _ in range(5))
        self.handover, self.later_tbt = Column("d"), Column("d")
        """later_tbt: TBT without the gap at the hand-over."""
        self.predicted, self.placed = Column("d"), Column("d")
        self.prefill = Column("d")
        """Time that computing the prompt takes by the time model, reused tokens taken off."""
        self.completed, self.effective = Column("b"), Column("b")
        self.input_tokens, self.output_tokens, self.cached_tokens = (Column("q") for _ in range(3))
        self.over_time: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        """By what happened, how often in which bin: arrived; effective, late, rejected or failed at its end; and, by arrival,
        input tokens and those of each tier."""
        self._slo = slo
        self._cost = cost
        self._write = write
        self._encode = msgspec.json.Encoder().encode
        self._loads: dict[int, list[int]] = {}
        self._held: dict[int, bytes] = {}
        """Lines of requests that ended before one that had come earlier."""
        self._next = 0

    def total(self, what: str) -> int:
        """Of one row of over_time."""
        return sum(self.over_time[what].values()) if what in self.over_time else 0

    def note_load(self, job: Job, num_tokens: int, source: SimSource) -> None:
        """A prefill begins to load so many tokens."""
        loads = self._loads.setdefault(job.key.request, [0, 0, 0])
        from_ssd = min(num_tokens, source.ssd_tokens)
        loads[not source.is_local] += num_tokens - from_ssd
        loads[2] += from_ssd

    def note_end(self, record: RequestRecord) -> None:
        times = record.choices[0].time_array()
        self.num_ended += 1
        self.num_retries += max(0, record.num_attempts - 1)
        self.num_wasted += not record.completed and _stage(record, Stage.PREFILL_START) is not None
        self.outcomes[record.outcome] += 1
        gaps = times[1:] - times[:-1]
        measured = _measure(record, times, gaps)
        effective = record.completed and _meets(self._slo, measured)
        self._append(record, times, measured, effective)
        if len(gaps):
            self.gaps.add(gaps)
        reused = self._take_reused(record)
        self._count(record, reused if len(times) else None, effective)
        if self._write is not None:
            self._held[record.number] = self._encode(_line(record, len(times), measured, reused, effective)) + b"\n"
            while (line := self._held.pop(self._next, None)) is not None:
                self._write(line)
                self._next += 1

    def _append(self, record: RequestRecord, times: np.ndarray, measured: Measured, effective: bool) -> None:
        ttft, network, tbt, itl, latency, handover, later_tbt = measured
        self.handover.append(handover)
        self.later_tbt.append(later_tbt)
        self.ttft.append(ttft)
        self.network.append(network)
        self.tbt.append(tbt)
        self.itl.append(itl)
        self.latency.append(latency)
        self.completed.append(record.completed)
        self.effective.append(effective)
        request, cached = record.request, record.cached_tokens
        self.input_tokens.append(request.num_tokens)
        self.output_tokens.append(len(times))
        self.cached_tokens.append(cached)
        placed = _stage(record, Stage.PLACED)
        predicted = placed is not None and len(times) > 0
        self.predicted.append(record.prediction.ttft_ns if predicted else NONE)
        self.placed.append(times[0] - placed if placed is not None and predicted else NONE)
        self.prefill.append(self._cost.prefill_ns(request.num_tokens - cached, cached) if len(times) else NONE)

    def _take_reused(self, record: RequestRecord) -> Reused:
        """What was loaded is known; the rest of what was reused lay in the instance's own pages."""
        local, remote, ssd = self._loads.pop(record.number, (0, 0, 0))
        return Reused(max(0, record.cached_tokens - local - remote - ssd), local, remote, ssd)

    def _count(self, record: RequestRecord, reused: Reused | None, effective: bool) -> None:
        """reused: None without a first token."""
        end = _stage(record, Stage.END) or START_NS
        self.last_ns = max(self.last_ns, end)
        over_time, arrived = self.over_time, (record.request.arrival_ns - START_NS) // self.bin_ns
        over_time["arrived"][arrived] += 1
        over_time[_kind(record, effective)][(end - START_NS) // self.bin_ns] += 1
        if reused is not None:
            over_time["input"][arrived] += record.request.num_tokens
            over_time["hbm"][arrived] += reused.hbm
            over_time["dram_local"][arrived] += reused.dram_local
            over_time["dram_remote"][arrived] += reused.dram_remote
            over_time["ssd"][arrived] += reused.ssd


class Measured(NamedTuple):
    """Nanoseconds; NONE where there is none."""

    ttft: float = NONE
    network: float = NONE
    tbt: float = NONE
    itl: float = NONE
    latency: float = NONE
    handover: float = NONE
    later_tbt: float = NONE


def _measure(record: RequestRecord, times: np.ndarray, gaps: np.ndarray) -> Measured:
    """The definitions of `mooncake.core.stats`, for arrays. gaps: between the times."""
    number, arrival = len(times), record.request.arrival_ns
    if not number:
        return Measured()
    first, last = int(times[0]), int(times[-1])
    network = record.choices[0].first_way
    if number == 1:
        return Measured(first - arrival, network, latency=last - arrival)
    in_order = gaps.copy()
    in_order.sort()
    tbt, itl = _tbt(in_order), (last - first) / (number - 1)
    if not record.prefill or record.prefill == record.decode:
        return Measured(first - arrival, network, tbt, itl, last - arrival, NONE, tbt)
    handover = int(gaps[0])
    later_tbt = _tbt_without(in_order, handover) if number > 2 else NONE
    return Measured(first - arrival, network, tbt, itl, last - arrival, handover, later_tbt)


def _tbt(in_order: np.ndarray) -> float:
    """Of at least one gap, the shortest first."""
    num_longest = math.ceil(TBT_SHARE * len(in_order))
    return _sum(in_order[-num_longest:]) / num_longest


def _tbt_without(in_order: np.ndarray, gap: int) -> float:
    """Of at least two, if one of that length is left out."""
    num_longest = math.ceil(TBT_SHARE * (len(in_order) - 1))
    if gap < in_order[-num_longest]:
        return _sum(in_order[-num_longest:]) / num_longest
    return (_sum(in_order[-num_longest - 1 :]) - gap) / num_longest


def _sum(few: np.ndarray) -> int:
    """Of few numbers numpy takes longer."""
    numbers: list[int] = few.tolist()
    return sum(numbers)


def _meets(slo: Slo, measured: Measured) -> bool:
    met_ttft = slo.ttft_ns is None or measured.ttft <= slo.ttft_ns
    return met_ttft and not (slo.tbt_ns is not None and measured.tbt > slo.tbt_ns)


def _stage(record: RequestRecord, stage: Stage) -> int | None:
    return record.timeline[stage] if record.timeline else None


def _kind(record: RequestRecord, effective: bool) -> str:
    if record.completed:
        return "effective" if effective else "late"
    return "rejected" if record.outcome == "overloaded" else "failed"


def _line(record: RequestRecord, num_output: int, measured: Measured, reused: Reused, effective: bool) -> RequestLine:
    ttft, network, tbt, itl, latency, handover, _ = (_ms(value) for value in measured)
    request, prediction, arrival = record.request, record.prediction, record.request.arrival_ns
    placed = _stage(record, Stage.PLACED) is not None
    stages = Stages(*[None if at is None else (at - arrival) / NANOS_PER_MS for at in record.timeline])
    return RequestLine(
        number=record.number,
        arrival_ms=(arrival - START_NS) / NANOS_PER_MS,
        input_tokens=request.num_tokens,
        output_tokens=num_output,
        cached_tokens=record.cached_tokens,
        reused=reused,
        outcome=record.outcome,
        detail=record.detail,
        effective=effective,
        ttft_ms=ttft,
        network_ms=network,
        predicted_ttft_ms=prediction.ttft_ns / NANOS_PER_MS if placed else None,
        tbt_ms=tbt,
        handover_ms=handover,
        predicted_tbt_ms=prediction.tbt_ns / NANOS_PER_MS if placed else None,
        itl_ms=itl,
        latency_ms=latency,
        prefill=record.prefill,
        decode=record.decode,
        attempts=record.num_attempts,
        stages_ms=stages,
    )


def _ms(time_ns: float) -> float | None:
    """To the microsecond."""
    return None if math.isnan(time_ns) else round(time_ns / NANOS_PER_MS, 3)
