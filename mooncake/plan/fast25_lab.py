"""The runs behind the figures of the paper: each at most once, all from one set of parameters; and a row of a figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from mooncake.core.errors import ConfigError
from mooncake.core.types import NANOS_PER_S, Slo
from mooncake.plan.fast25_parameters import Parameters
from mooncake.plan.fast25_published import TRACE_FILES
from mooncake.plan.options import ReplayOptions, flag
from mooncake.plan.replay import CheckedTrace, Outcome, check, replay_trace
from mooncake.sim.hardware import MODELS
from mooncake.sim.report import effective_share
from mooncake.trace.files import open_trace
from mooncake.trace.types import TraceRequest

RUN, ABSENT, NOT_RUN = "run", "absent", "not run"


class Row(msgspec.Struct, frozen=True):
    """deviation: simulated / published - 1. unit: share, gain, ratio, s, ms, Gbps, requests, or "" for a plain number.
    status: absent: the trace is not there; not run: what it needs is not built."""

    figure: str
    row: str
    published: float | None
    simulated: float | None
    deviation: float | None
    unit: str
    status: str = RUN
    note: str = ""


def row(
    figure: str,
    name: str,
    published: float | None,
    simulated: float | None,
    unit: str,
    note: str = "",
    status: str = RUN,
) -> Row:
    deviation = None
    if published and simulated is not None:
        deviation = round(simulated / published - 1, 4)
    return Row(
        figure, name, published, None if simulated is None else round(simulated, 6), deviation, unit, status, note
    )


def absent(figure: str, name: str, published: float | None, unit: str, trace: str) -> Row:
    return row(figure, name, published, None, unit, f"no {TRACE_FILES[trace]}", ABSENT)


class Lab:
    """limit: requests of each trace; None: all. say: told what runs."""

    def __init__(self, folder: Path, parameters: Parameters, limit: int | None, say: Callable[[str], object]) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder} (--trace-dir): not a folder")
        self.parameters = parameters
        self.limit = limit
        self._folder = folder
        self._say = say
        self._traces: dict[str, CheckedTrace | None] = {}
        self._runs: dict[tuple[str, ReplayOptions], Outcome] = {}

    @property
    def num_runs(self) -> int:
        return len(self._runs)

    def check(self) -> None:
        """Reads all traces that are there. Raises TraceError."""
        for name in TRACE_FILES:
            self.trace(name)

    def trace(self, name: str) -> CheckedTrace | None:
        """None: it is not there. Raises TraceError for one that is not sound."""
        if name not in self._traces:
            path = self._folder / TRACE_FILES[name]
            self._traces[name] = check(str(path), limit=self.limit) if path.exists() else None
        return self._traces[name]

    def requests(self, name: str) -> Iterator[TraceRequest]:
        """Of a trace that is there."""
        for number, request in enumerate(open_trace(self._folder / TRACE_FILES[name])):
            if number == self.limit:
                return
            yield request

    def mooncake(self, name: str, **options: Any) -> Outcome:
        """Separate pools; options over those of the parameters."""
        parameters = self.parameters
        pools = {"prefill": parameters.prefill, "decode": parameters.num_nodes - parameters.prefill}
        return self._run(name, {"policy": parameters.mooncake} | pools | options)

    def vllm(self, name: str, **options: Any) -> Outcome:
        """Colocated instances."""
        parameters = self.parameters
        return self._run(name, {"policy": parameters.vllm_router, "colocated": parameters.num_nodes} | options)

    def _run(self, name: str, given: dict[str, Any]) -> Outcome:
        parameters = self.parameters
        own: dict[str, Any] = {
            "hardware": parameters.hardware,
            "model": parameters.model,
            "block_tokens": parameters.block_tokens,
            "store_memory": parameters.store_tokens * MODELS[parameters.model].kv_token_bytes,
            "eviction": parameters.eviction,
            "jitter": parameters.jitter,
            "seed": parameters.seed,
            "limit": self.limit,
        }
        options = ReplayOptions(**(own | given))
        found = self._runs.get((name, options))
        if found is None:
            trace = self.trace(name)
            assert trace is not None
            began = time.monotonic()
            found = self._runs[name, options] = replay_trace(trace, options)
            shown = " ".join(f"{flag(key)} {value}" for key, value in given.items())
            self._say(f"{name} {shown}: {found.report.requests.total:,} requests in {time.monotonic() - began:.0f} s")
        return found


def capacity(outcome: Outcome, ttft_s: float, tbt_s: float, *, handover: bool = True) -> float:
    """The effective request capacity at these objectives; as in `effective_share`."""
    slo = Slo(round(ttft_s * NANOS_PER_S), round(tbt_s * NANOS_PER_S))
    found = effective_share(outcome.replay, slo, handover=handover)
    assert found is not None  # a trace has requests
    return found
