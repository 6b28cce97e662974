"""What a replay is told: declared once, for the command line as well. Imports little, as every command reads it."""

from __future__ import annotations

import typing
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mooncake.config import parse_bytes
from mooncake.core.errors import ConfigError
from mooncake.core.types import NANOS_PER_S, Slo

AUTO = "auto"
_Count = Annotated[int, Meta(ge=1, le=1 << 31)]
_Size = Annotated[int, Meta(ge=1, le=1 << 50, extra={"unit": "bytes"})]


def _text(description: str) -> Meta:
    return Meta(description=description)


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """None: the default of the text, or with cluster what that file says."""

    cluster: Annotated[str | None, _text("a configuration file of mooncake serve: simulate that cluster")] = None
    prefill: Annotated[Annotated[int, Meta(ge=0, le=4096)] | None, _text("prefill instances; 8")] = None
    decode: Annotated[Annotated[int, Meta(ge=0, le=4096)] | None, _text("decode instances; 8")] = None
    colocated: Annotated[
        Annotated[int, Meta(ge=0, le=4096)] | None,
        _text("instances that do both, the baseline, instead of the two pools; whole prompts in one step"),
    ] = None
    hardware: Annotated[
        str | None, _text("nodes, one per instance: a800x8, a100x8, h100x8, h200x8, b200x8; a800x8")
    ] = None
    model: Annotated[str | None, _text("llama3-70b")] = None
    policy: Annotated[str | None, _text("how the Conductor places requests; joint")] = None
    admission: Annotated[str | None, _text("refuse by predictions: off, soft, hard; off")] = None
    admission_rule: Annotated[
        str | None, _text("what it goes by: placement, baseline, early, early_predicted; placement")
    ] = None
    block_tokens: Annotated[_Count | None, _text("unit of reuse; 512")] = None
    kv_tokens: Annotated[_Count | None, _text("KV room of an instance; what fits beside the weights")] = None
    store_memory: Annotated[_Size | None, _text("DRAM of a node's store, such as 1TiB; 3M tokens")] = None
    eviction: Annotated[
        str | None, _text("what goes first from a full store: lru, lfu, fifo, s3fifo, learned; lru")
    ] = None
    store_ssd: Annotated[_Size | None, _text("SSD of a node's store, such as 16TiB; none")] = None
    ssd_rate: Annotated[
        _Size | None, _text("what that reads and writes in a second, together, such as 20GiB; 6 GB")
    ] = None
    nic_gbps: Annotated[
        Annotated[float, Meta(gt=0, le=1e6)] | None, _text("a node's network, gigabits per second; the hardware's")
    ] = None
    assumed_nic_gbps: Annotated[
        Annotated[float, Meta(gt=0, le=1e6)] | None, _text("what the Conductor takes that network for; what it is")
    ] = None
    max_batch: Annotated[_Count | None, _text("sequences in a decode step; 256")] = None
    max_step_tokens: Annotated[
        _Count | None, _text("prefill tokens in a step; with colocated it chunks prompts; 8192 else")
    ] = None
    speed: Annotated[float, Meta(gt=0, le=1e6), _text("factor by which requests come faster than in the trace")] = 1.0
    slo: Annotated[str | None, _text("objectives, seconds, such as ttft=30,tbt=0.1; none, or the file's")] = None
    jitter: Annotated[
        str, _text("seconds over which each timestamp is spread; auto: the step of the trace's clock; 0")
    ] = "0"
    reuse: Annotated[str, _text("off: no prompt shares KV with another (on, off)")] = "on"
    output: Annotated[_Count | None, _text("output tokens of every request; the trace's")] = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1), _text("of all random choices; 0")] = 0
    limit: Annotated[_Count | None, _text("requests, from the beginning; all")] = None
    timeout: Annotated[float, Meta(gt=0, le=1e6), _text("seconds until a request is given up; 600")] = 600.0


def texts() -> dict[str, str]:
    """By name, in the order of the declaration."""
    hints = typing.get_type_hints(ReplayOptions, include_extras=True)
    return {
        field.name: next(meta.description for meta in hints[field.name].__metadata__ if meta.description)
        for field in msgspec.structs.fields(ReplayOptions)
    }


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_options(given: dict[str, str]) -> ReplayOptions:
    """From text by name. Raises ConfigError."""
    values: dict[str, Any] = dict(given)
    for name in ("store_memory", "store_ssd", "ssd_rate"):
        if name in given:
            values[name] = parse_bytes(given[name])
            if values[name] is None:
                raise _bad(name, given[name], "expected a size such as 512GiB or 1TiB")
    for name, value in values.items():
        try:
            msgspec.convert({name: value}, ReplayOptions, strict=False)
        except msgspec.ValidationError as error:
            reason = str(error).partition(" - at ")[0].replace(" | null", "")
            raise _bad(name, given[name], reason[:1].lower() + reason[1:]) from None
    options = msgspec.convert(values, ReplayOptions, strict=False)
    if options.reuse not in ("on", "off"):
        raise _bad("reuse", options.reuse, "expected on or off")
    parse_slo(options.slo)
    jitter_s(options.jitter, None)
    return options


def parse_slo(text: str | None) -> Slo:
    """ttft=30,tbt=0.1 or one of them, in seconds."""
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        seconds = _seconds(value)
        if name.strip() not in ("ttft", "tbt") or not seconds:
            raise _bad("slo", text, "expected seconds, such as ttft=30,tbt=0.1")
        found[f"{name.strip()}_ns"] = round(seconds * NANOS_PER_S)
    return Slo(**found)


def jitter_s(text: str, clock_step_s: float | None) -> float:
    """clock_step_s: what `auto` means for this trace."""
    if text == AUTO:
        return clock_step_s or 0.0
    seconds = _seconds(text)
    if seconds is None:
        raise _bad("jitter", text, "expected seconds, or auto")
    return seconds


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds <= 1e6 else None


def _bad(name: str, value: object, reason: str) -> ConfigError:
    return ConfigError(f"{name} = {value!r} ({flag(name)}): {reason}")
