"""`mooncake replay`: a checked trace through a simulated cluster, and what is written of it."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from mooncake.config import STORE_SSD_BYTES_MIN, format_bytes, load_config
from mooncake.core.errors import ConfigError
from mooncake.core.garbage import GC_THRESHOLDS
from mooncake.core.types import NANOS_PER_S, Slo
from mooncake.plan.options import ReplayOptions, flag, jitter_s, parse_slo
from mooncake.sim.cluster import ClusterConfig
from mooncake.sim.hardware import HARDWARES, MODELS, NUM_GPUS, USD_PER_GPU_HOUR
from mooncake.sim.live_config import Machines, cluster_config, machines_config
from mooncake.sim.replay import Progress, Replay, run_replay
from mooncake.sim.report import ClusterSection, Report, Setup, TraceSection, clock_note, make_report
from mooncake.sim.workload import Workload, check_blocks, sim_requests
from mooncake.store.eviction import DEFAULT_POLICY, POLICIES
from mooncake.trace.files import check_trace, open_trace
from mooncake.trace.stats import GAPS_MAX, clock_step
from mooncake.trace.types import TraceSummary

DEFAULT_HARDWARE, DEFAULT_MODEL = "a800x8", "llama3-70b"
DEFAULT_INSTANCES = 8
_TIMED_MODEL = "LLaMA-3.1-70B"
SUMMARY, LINES, PAGE = "summary.json", "requests.jsonl", "report.html"
_FILE_KEYS = (
    "prefill", "decode", "policy", "admission", "admission_rule", "block_tokens", "kv_tokens", "store_memory", "eviction",
    "max_batch", "max_step_tokens",
)  # fmt: skip
"""Options that are also keys of the configuration file, which they override."""
_MACHINE_KEYS = ("hardware", "model", "colocated", "nic_gbps", "assumed_nic_gbps", "store_ssd", "ssd_rate")


class Target(msgspec.Struct, frozen=True):
    """A simulated cluster, and what is known of it that the simulator does not need."""

    config: ClusterConfig
    hardware: str
    model: str
    num_gpus: int
    usd_per_gpu_hour: float | None
    note: str
    slo: Slo = Slo()


class CheckedTrace(msgspec.Struct, frozen=True):
    """A trace that was read to its end and found sound. clock_step_s: None for a fine clock. num_requests, span_ns: of the part
    that is wanted."""

    summary: TraceSummary
    clock_step_s: float | None
    num_requests: int
    span_ns: int


def check(path: str, trace_format: str | None = None, limit: int | None = None) -> CheckedTrace:
    """Raises TraceError."""
    summary = check_trace(path, trace_format)
    step = _clock_step_s(path, trace_format)
    if limit is None or limit >= summary.num_requests:
        return CheckedTrace(summary, step, summary.num_requests, summary.span_ns)
    for request in islice(open_trace(path, trace_format), limit):
        span_ns = request.arrival_ns
    return CheckedTrace(summary, step, limit, span_ns)


def _clock_step_s(path: str, trace_format: str | None) -> float | None:
    beginning = islice(open_trace(path, trace_format), GAPS_MAX)
    gaps = np.diff(np.fromiter((request.arrival_ns for request in beginning), np.int64))
    step = clock_step(gaps[gaps > 0], float(gaps.mean())) if len(gaps) else None
    return step / NANOS_PER_S if step is not None else None


def target(options: ReplayOptions) -> Target:
    """Raises ConfigError."""
    return _from_file(options, options.cluster) if options.cluster is not None else _from_machines(options)


def _from_file(options: ReplayOptions, file: str) -> Target:
    given = {name: value for name in (*_FILE_KEYS, *_MACHINE_KEYS) if (value := getattr(options, name)) is not None}
    for name in _MACHINE_KEYS:
        if name in given:
            raise ConfigError(f"{flag(name)}: the cluster is that of {file} ({flag('cluster')})")
    config = load_config(file, given)
    objectives = (config.slo.ttft_s, config.slo.tbt_s)
    slo = Slo(*(None if seconds is None else round(seconds * NANOS_PER_S) for seconds in objectives))
    hardware = config.simulated.hardware
    note = f"the cluster of {file}, on one machine; each step takes what {_TIMED_MODEL} takes on {NUM_GPUS} GPUs ({hardware})"
    usd = USD_PER_GPU_HOUR.get(hardware)
    return Target(cluster_config(config), hardware, f"simulated as {_TIMED_MODEL}", NUM_GPUS, usd, note, slo)


def _from_machines(options: ReplayOptions) -> Target:
    hardware = _known("hardware", options.hardware or DEFAULT_HARDWARE, HARDWARES)
    model = _known("model", options.model or DEFAULT_MODEL, MODELS)
    colocated = options.colocated or 0
    if colocated and (options.prefill or options.decode):
        raise ConfigError("--colocated: there are no pools of prefill and decode beside it")
    default = 0 if colocated else DEFAULT_INSTANCES
    prefill, decode = (default if count is None else count for count in (options.prefill, options.decode))
    if not colocated and not (prefill and decode):
        raise ConfigError(f"{prefill} prefill and {decode} decode instances: each pool needs one at least")
    if options.store_ssd is not None and options.store_ssd < STORE_SSD_BYTES_MIN:
        raise ConfigError(f"--store-ssd: {options.store_ssd} bytes; {format_bytes(STORE_SSD_BYTES_MIN)} are the least")
    machines = Machines(
        hardware=hardware,
        model=model,
        prefill=prefill,
        decode=decode,
        colocated=colocated,
        kv_tokens=options.kv_tokens,
        store_bytes=options.store_memory,
        eviction=_known("eviction", options.eviction or DEFAULT_POLICY, {name: name for name in POLICIES}),
        ssd_bytes=options.store_ssd or 0,
        ssd_bytes_per_s=options.ssd_rate,
        nic_bytes_per_s=_bytes_per_s(options.nic_gbps),
        assumed_nic_bytes_per_s=_bytes_per_s(options.assumed_nic_gbps),
        max_step_tokens=options.max_step_tokens,
        conductor={
            "policy": options.policy or "joint",
            "admission": options.admission or "off",
            "admission_rule": options.admission_rule or "placement",
        },
    )
    wanted = {"block_tokens": options.block_tokens, "max_batch": options.max_batch}
    machines = msgspec.structs.replace(machines, **{name: value for name, value in wanted.items() if value is not None})
    try:
        config = machines_config(machines)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        raise ConfigError(f"{name} = {machines.conductor.get(name)!r} ({flag(name)}): {reason}") from None
    note = "the length of a context is bounded by KV room alone"
    return Target(config, hardware.name, model.name, hardware.num_gpus, hardware.usd_per_gpu_hour, note)


def _bytes_per_s(gbps: float | None) -> float | None:
    return gbps * 1e9 / 8 if gbps is not None else None


def _known(name: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise ConfigError(f"{name} = {value!r} ({flag(name)}): not known; there are {', '.join(known)}")
    return known[value]


# ------------------------------------------------------------ running


class Outcome(msgspec.Struct, frozen=True):
    replay: Replay
    report: Report


def replay_trace(
    trace: CheckedTrace,
    options: ReplayOptions,
    *,
    write: Callable[[bytes], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Outcome:
    """Raises ConfigError before anything runs."""
    aim, info = target(options), trace.summary.info
    check_blocks(info.format, aim.config.block_tokens)
    spread_s = jitter_s(options.jitter, trace.clock_step_s)
    workload = Workload(
        limit=options.limit,
        speed=options.speed,
        jitter_ns=round(spread_s * NANOS_PER_S),
        seed=options.seed,
        slo=parse_slo(options.slo) if options.slo else aim.slo,
        timeout_ns=round(options.timeout * NANOS_PER_S),
        reuse=options.reuse == "on",
        output_length=options.output,
    )
    done = run_workload(trace, aim.config, workload, write=write, on_progress=on_progress)
    return Outcome(done, make_report(done, _setup(trace, aim, workload, options)))


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_workload(
    trace: CheckedTrace,
    config: ClusterConfig,
    workload: Workload,
    *,
    write: Callable[[bytes], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> Replay:
    info = trace.summary.info
    requests = sim_requests(open_trace(info.path, info.format.name), info.format, config.block_tokens, workload)
    with _rare_collection():
        return run_replay(
            config,
            requests,
            round(trace.span_ns / workload.speed) + workload.jitter_ns,
            seed=workload.seed,
            slo=workload.slo,
            timeout_ns=workload.timeout_ns,
            write=write,
            on_progress=on_progress,
        )


def _setup(trace: CheckedTrace, aim: Target, workload: Workload, options: ReplayOptions) -> Setup:
    summary, config = trace.summary, aim.config
    slo = workload.slo
    jitter = workload.jitter_ns / NANOS_PER_S
    return Setup(
        trace=TraceSection(
            path=summary.info.path,
            format=summary.info.format.name,
            synthetic=summary.info.synthetic,
            block_tokens=summary.info.format.block_tokens,
            num_requests=summary.num_requests,
            num_skipped=summary.num_skipped,
            span_s=summary.span_ns / NANOS_PER_S,
            input_tokens=summary.input_tokens,
            output_tokens=summary.output_tokens,
            clock_step_s=trace.clock_step_s,
        ),
        cluster=_cluster_section(aim),
        speed=workload.speed,
        jitter_s=jitter,
        limit=workload.limit,
        seed=workload.seed,
        ttft_slo_s=None if slo.ttft_ns is None else slo.ttft_ns / NANOS_PER_S,
        tbt_slo_s=None if slo.tbt_ns is None else slo.tbt_ns / NANOS_PER_S,
        reuse=workload.reuse and summary.info.format.has_prefixes,
        num_gpus=aim.num_gpus,
        usd_per_gpu_hour=aim.usd_per_gpu_hour,
        notes=[*_notes(trace, config, workload), aim.note],
    )


def _cluster_section(aim: Target) -> ClusterSection:
    config = aim.config
    return ClusterSection(
        prefill=config.prefill,
        decode=config.decode,
        colocated=config.colocated,
        nodes=config.nodes,
        hardware=aim.hardware,
        model=aim.model,
        block_tokens=config.block_tokens,
        kv_tokens_per_instance=config.num_pages * config.page_tokens,
        store_bytes_per_node=config.node.capacity_bytes,
        eviction=config.node.eviction,
        ssd_bytes_per_node=config.node.ssd_bytes,
        ssd_bytes_per_s=config.node.ssd_bytes_per_s,
        nic_bytes_per_s=config.node.nic_bytes_per_s,
        host_bytes_per_s=config.node.local_bytes_per_s,
        max_batch=config.decode_batch,
        max_step_tokens=config.max_step_tokens,
        policy=config.conductor.policy,
        admission=config.conductor.admission,
        admission_rule=config.conductor.admission_rule,
    )


def _notes(trace: CheckedTrace, config: ClusterConfig, workload: Workload) -> Iterator[str]:
    """What was assumed, and what a reader must know."""
    info = trace.summary.info
    yield clock_note(trace.clock_step_s, workload.jitter_ns / NANOS_PER_S)
    if info.synthetic:
        yield "the trace is synthetic: made by mooncake trace synth, its prefixes included"
    if not info.format.has_prefixes:
        yield f"the {info.format.name} format says nothing of prefixes: no prompt shares KV with another"
    elif not workload.reuse:
        yield "reuse is off: no prompt shares KV with another"
    if workload.output_length is not None:
        yield f"every request has {workload.output_length} output tokens instead of the trace's"
    own = info.format.block_tokens
    if own is not None and own > config.block_tokens:
        yield f"blocks of {config.block_tokens} tokens: what two prompts share within a block of {own} is not seen"
    if trace.summary.num_skipped:
        yield f"{trace.summary.num_skipped} requests that failed when the trace was taken are left out"
    yield "no policy sees output lengths"


# ------------------------------------------------------------ writing


@contextlib.contextmanager
def lines_file(folder: str | None) -> Iterator[BinaryIO | None]:
    """requests.jsonl in that folder, which is made; it is there, or replaced, when all is written. None without a folder."""
    if folder is None:
        yield None
        return
    path = Path(folder) / LINES
    partial = path.with_name(f".{LINES}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{folder} (--out): {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def encode_report(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def write_report(folder: str, report: Report, page: str) -> None:
    """Beside the lines that are there already."""
    try:
        (Path(folder) / SUMMARY).write_bytes(encode_report(report))
        (Path(folder) / PAGE).write_text(page, "utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} (--out): {error.strerror}") from None
