"""Configuration, declared once.

Every field of `Config` carries its type, its bounds and its text; file keys, environment variables, flags and the help page
are derived from it. Sources, weakest first: defaults, the file of --config (TOML, or JSON as the supervisor writes it),
MOONCAKE_* variables, flags. One key in its spellings:

    slo.ttft_s      [slo] ttft_s = 2.5      MOONCAKE_SLO_TTFT_S=2.5      --slo-ttft-s 2.5

An unknown key or a bad value is a ConfigError that names the key, the value and where it came from. This is the only file
that reads the environment.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import tempfile
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from mooncake.core.errors import ConfigError

ENV_PREFIX = "MOONCAKE_"
STATUS_FD = ENV_PREFIX + "STATUS_FD"
SUPERVISOR_PID = ENV_PREFIX + "SUPERVISOR_PID"
_LAUNCH_VARIABLES = frozenset({STATUS_FD, SUPERVISOR_PID})

SOCKET_PATH_BYTES_MAX = 100
"""Linux allows 107 bytes in the path of a Unix socket; gRPC and the store add nothing, the rest is for safety."""

QUOTAS_MAX = 1024
"""Tenants with a quota: bounds what store nodes and their directory tell each other."""
STORE_SSD_BYTES_MIN = 16 << 20
"""Less is no tier, and has hardly room for an object."""

_ORIGIN = re.compile(r"https?://[^\s/?#,@]+")

_BYTE_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BYTE_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
NumBytes = Annotated[int, Meta(ge=1, le=1 << 50, extra={"unit": "bytes"})]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
Name = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,30}$")]
NonEmpty = Annotated[str, Meta(min_length=1)]
Environment = Mapping[str, str]


def _text(description: str) -> Meta:
    return Meta(description=description)


_VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are folders by then
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine process computes by itself where one worker is enough
    "VLLM_HOST_IP": "127.0.0.1",
}
VLLM_CORES = "VLLM_CPU_OMP_THREADS_BIND"
"""Without it all instances of a machine compute on its first processor."""


class SloConfig(msgspec.Struct, frozen=True):
    """objectives of requests that name none"""

    ttft_s: Annotated[Seconds | None, _text("time to first token, seconds; none: no objective")] = None
    tbt_s: Annotated[Seconds | None, _text("mean of the longest tenth of token gaps, seconds; none: no objective")] = (
        None
    )


class LimitConfig(msgspec.Struct, frozen=True):
    """bounds of queues and buffers"""

    requests: Annotated[Count, _text("requests open at a frontend; more are answered 429")] = 1024
    queue: Annotated[Count, _text("requests waiting at an instance; more are refused")] = 512
    body: Annotated[NumBytes, _text("size of an HTTP request body")] = 16 << 20
    client_buffer: Annotated[NumBytes, _text("output waiting for a slow client before it is disconnected")] = 1 << 20


class TimeoutConfig(msgspec.Struct, frozen=True):
    """bounds of waits, seconds"""

    request_s: Annotated[Seconds, _text("whole request")] = 600.0
    placement_s: Annotated[Seconds, _text("for an instance that can take a request")] = 30.0
    rpc_s: Annotated[Seconds, _text("for the answer of another process")] = 5.0
    start_s: Annotated[Seconds, _text("for all processes to become ready")] = 300.0
    drain_s: Annotated[Seconds, _text("for running work when a process is told to stop")] = 5.0


class SimulatedConfig(msgspec.Struct, frozen=True):
    """the simulated engine"""

    hardware: Annotated[
        Literal["zero", "a800-paper", "a100", "h100", "h200", "b200"],
        _text("whose time model (LLaMA-3.1-70B on 8 GPUs); zero: steps take no time"),
    ] = "h100"
    speed: Annotated[float, Meta(gt=0, le=1e6), _text("factor by which it runs faster than that hardware")] = 1.0


class RateConfig(msgspec.Struct, frozen=True):
    """bytes per second at which KV moves: what the Conductor prices loads and links by"""

    dram_bytes_per_s: Annotated[NumBytes, _text("one transfer from the store's memory to an instance beside it")] = (
        10**10
    )
    ssd_bytes_per_s: Annotated[NumBytes, _text("from a store node's SSD, of all its transfers together")] = 2 * 10**9
    remote_bytes_per_s: Annotated[NumBytes, _text("one transfer from another machine")] = 5 * 10**9
    nic_bytes_per_s: Annotated[NumBytes, _text("a machine's network each way, of all its transfers together")] = (
        5 * 10**9
    )


class TlsConfig(msgspec.Struct, frozen=True):
    """TLS between processes and, with cert and key, of the HTTP port"""

    cert: Annotated[NonEmpty | None, _text("certificate chain, a PEM file")] = None
    key: Annotated[NonEmpty | None, _text("its private key, a PEM file")] = None
    ca: Annotated[NonEmpty | None, _text("authorities that peers' certificates must come from, a PEM file")] = None


class Config(msgspec.Struct, frozen=True):
    """serving"""

    model: Annotated[NonEmpty, _text("a folder, a name that ships with a package, or a hub name")] = (
        "smollm2-135m-instruct"
    )
    model_name: Annotated[str, _text("name of the model for clients; empty: the model's own")] = ""
    engine: Annotated[Literal["torch", "vllm", "simulated"], _text("what computes the tokens")] = "torch"
    engine_python: Annotated[NonEmpty | None, _text("another Python interpreter for the instances")] = None
    vllm_args: Annotated[str, _text("more of vLLM's engine arguments, a JSON object; docs/vllm.md")] = ""
    dtype: Annotated[Literal["bfloat16", "float32"], _text("of weights and KV")] = "bfloat16"
    prefill: Annotated[int, Meta(ge=1, le=64), _text("number of prefill instances")] = 1
    decode: Annotated[int, Meta(ge=1, le=64), _text("number of decode instances")] = 1
    store_memory: Annotated[NumBytes, _text("DRAM of the store node, such as 2GiB")] = 1 << 30
    store_ssd: Annotated[NumBytes | None, _text("SSD of the store node, such as 100GiB; none: no SSD tier")] = None
    store_ssd_dir: Annotated[NonEmpty | None, _text("folder on that SSD, for the store node's file")] = None
    store_quotas: Annotated[
        str, _text("memory of all store nodes that tenants may fill, such as alice=10GiB,bob=2GiB; others: no limit")
    ] = ""
    eviction: Annotated[
        Literal["lru", "lfu", "fifo", "s3fifo", "learned"], _text("what goes first from a full store; docs/eviction.md")
    ] = "lru"
    host: Annotated[NonEmpty, _text("address that the HTTP port listens on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535), _text("HTTP port; 0: a free one")] = 8000

    api_keys: Annotated[
        NonEmpty | None, _text("key file of `mooncake keys`; clients must send a key of it; none: open to everybody")
    ] = None
    cors_origins: Annotated[
        str,
        _text("web pages of these origins may use the API, such as https://chat.example, comma-separated; *: of all"),
    ] = ""

    cluster: Annotated[Name, _text("name of the cluster; one of each name runs on a machine")] = "default"
    run_dir: Annotated[str, _text("folder of sockets and logs; empty: one in the user's runtime folder or in /tmp")] = (
        ""
    )
    token: Annotated[str, Meta(extra={"secret": True}), _text("secret shared by all processes of the cluster")] = ""

    policy: Annotated[
        Literal["random", "round_robin", "least_load", "local_cache_aware", "algorithm1", "joint"],
        _text("how instances are chosen"),
    ] = "joint"
    admission: Annotated[
        Literal["off", "soft", "hard"],
        _text("refuse requests whose predicted times break their objectives; soft: once predictions have proved right"),
    ] = "soft"
    admission_rule: Annotated[
        Literal["placement", "baseline", "early", "early_predicted"],
        _text(
            "times it goes by: of the chosen instances; TTFT, and decode after prefill; the decode pool's now; or its then"
        ),
    ] = "placement"
    replicate: Annotated[Literal["off", "on"], _text("copy prefixes that are often used to more store nodes")] = "off"
    switch_roles: Annotated[
        Literal["off", "on"], _text("move instances between prefill and decode when one of them has too much to do")
    ] = "off"

    block_tokens: Annotated[int, Meta(ge=1, le=4096), _text("tokens of a block, the unit of reuse")] = 128
    page_tokens: Annotated[int, Meta(ge=1, le=4096), _text("tokens of an engine page; divides block_tokens")] = 32
    kv_tokens: Annotated[Count | None, _text("KV room of each instance, tokens; auto: by free memory")] = None
    max_context: Annotated[Count | None, _text("longest prompt plus output, tokens; auto: the model's")] = None
    max_batch: Annotated[int, Meta(ge=1, le=4096), _text("sequences in one step")] = 64
    max_step_tokens: Annotated[Count, _text("prefill tokens in one step")] = 512
    threads: Annotated[Count | None, _text("of each instance; auto: cores / instances")] = None

    tool_parser: Annotated[
        Literal["auto", "hermes", "llama3", "mistral", "json"],
        _text("how the model writes calls of tools; auto: by its chat template"),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "off", "think"],
        _text("whether the model reasons between <think> marks; auto: by its chat template"),
    ] = "auto"

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1), _text("of every random choice that no client seeds")] = 0
    event_log: Annotated[NonEmpty | None, _text("folder for the event logs of all cores; none: not kept")] = None
    metrics_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        _text(
            "first of the ports of 127.0.0.1 where processes answer GET /metrics, one after the other; none: nowhere"
        ),
    ] = None
    otlp_endpoint: Annotated[
        NonEmpty | None,
        _text("where spans of requests go, OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; none: nowhere"),
    ] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _text("of the log files")] = "info"

    slo: SloConfig = SloConfig()
    limits: LimitConfig = LimitConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    simulated: SimulatedConfig = SimulatedConfig()
    rates: RateConfig = RateConfig()
    tls: TlsConfig = TlsConfig()


ServiceRole = Literal["conductor", "prefill", "decode", "store", "directory", "frontend"]


class RoleConfig(msgspec.Struct, frozen=True):
    """Which process of the cluster this one is. Addresses are unix:/path or host:port; the store's data port is unix:/path or
    tcp://host:port."""

    role: ServiceRole
    name: str
    listen: str
    """Where this process serves: gRPC, or the store node's data port. A frontend listens on Config.host and port."""
    conductor: str
    """Empty for a store node that belongs to none."""
    node: str
    """Name of this machine's store node."""
    store: str
    """Data port of that node."""
    directory: str = ""
    """Of a store node: the directory that it reports to, and is asked for copies by; empty: the Conductor only."""
    metrics: str = ""
    """host:port where the process answers GET /metrics and /health; empty: nowhere."""


class Launch(msgspec.Struct, frozen=True):
    """What a supervisor passes to its child by the environment; both None in a process started by hand."""

    status_fd: int | None
    supervisor_pid: int | None


class Option(msgspec.Struct, frozen=True):
    """One leaf of the declaration."""

    path: tuple[str, ...]
    section: str
    type: Any
    default: Any
    text: str
    optional: bool
    is_bytes: bool
    secret: bool
    choices: tuple[str, ...]

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def flag(self) -> str:
        return "--" + "-".join(self.path).replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + "_".join(self.path).upper()

    @property
    def help(self) -> str:
        words = f"{self.text} ({', '.join(self.choices)})" if self.choices else self.text
        return f"{words} [{self.render_default()}]"

    def render_default(self) -> str:
        if self.default is None:
            return "auto" if "auto:" in self.text else "none"
        return format_bytes(self.default) if self.is_bytes else str(self.default) or "empty"

    def parse(self, raw: Any, origin: str) -> Any:
        value = raw
        if raw is None and self.optional:
            return None
        if isinstance(raw, str):
            if self.optional and raw.lower() in ("auto", "none"):
                return None
            value = parse_bytes(raw) if self.is_bytes else raw
        try:
            if value is None and self.is_bytes:
                raise msgspec.ValidationError("Expected a size such as 512MiB or 2GiB")
            return msgspec.convert(value, self.type, strict=False)
        except msgspec.ValidationError as error:
            shown = "(secret)" if self.secret else repr(raw)
            reason = f"expected one of {', '.join(self.choices)}" if self.choices else str(error).partition(" - at ")[0]
            raise ConfigError(f"{self.key} = {shown} ({origin}): {reason[:1].lower()}{reason[1:]}") from None


def parse_bytes(text: str) -> int | None:
    """2GiB, 512 MiB, 1.5g or 4096 in bytes; None if it is none of these."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]i?|)b?", text.strip().lower())
    return int(float(match[1]) * _BYTE_UNITS[match[2]]) if match else None


def parse_origins(text: str) -> tuple[str, ...]:
    """Of `cors_origins`. Raises ConfigError."""
    found = tuple([part.strip() for part in text.split(",")]) if text.strip() else ()
    for origin in found:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"cors_origins: {origin!r} is no origin; must be * or like https://chat.example:8443")
    return found


def parse_quotas(text: str) -> dict[str, int]:
    """Bytes by tenant, of TENANT=BYTES,TENANT=BYTES. Raises ConfigError."""
    quotas: dict[str, int] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        tenant, _, size = part.rpartition("=")
        quota = parse_bytes(size)
        if not tenant or not quota or tenant in quotas:
            raise ConfigError(f"store_quotas = {text!r}: {part!r} is not TENANT=BYTES, each tenant once")
        quotas[tenant] = quota
    if len(quotas) > QUOTAS_MAX:
        raise ConfigError(f"store_quotas: {len(quotas)} tenants; at most {QUOTAS_MAX} have quotas")
    return quotas


def format_quotas(quotas: Mapping[str, int]) -> str:
    """What `parse_quotas` reads."""
    return ",".join([f"{tenant}={quota}" for tenant, quota in quotas.items()])


def format_bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 10**9), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def _leaves(section: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[Option]:
    hints = typing.get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        hint, here = hints[field.name], (*path, field.encode_name)
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from _leaves(hint, here)
            continue
        metas = list(_metas(hint))
        bare = get_origin(hint.__origin__)
        yield Option(
            path=here,
            section=section.__doc__ or "",
            type=hint,
            default=field.default,
            text=next(meta.description for meta in metas if meta.description),
            optional=bare is types.UnionType or bare is typing.Union,
            is_bytes=any((meta.extra or {}).get("unit") == "bytes" for meta in metas),
            secret=any((meta.extra or {}).get("secret") for meta in metas),
            choices=get_args(hint.__origin__) if bare is Literal else (),
        )


def _metas(hint: Any) -> Iterator[Meta]:
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        if get_origin(inner) in (Annotated, types.UnionType, typing.Union):
            yield from _metas(inner)


@functools.cache
def options() -> dict[str, Option]:
    """All options by key, in the order of the declaration."""
    return {option.key: option for option in _leaves(Config)}


# ---------------------------------------------------------------- sources


def load_config(
    file: str | None = None, flags: Mapping[str, Any] | None = None, environ: Environment | None = None
) -> Config:
    """The configuration from all sources. flags: values by key. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for source, origin in (
        (_from_file(file) if file else {}, f"config file {file}"),
        (_from_environment(environ), "environment"),
        (flags or {}, "flag"),
    ):
        for key, raw in source.items():
            option = options().get(key)
            if option is None:
                raise ConfigError(f"{key} ({origin}): unknown key{_suggestion(key, list(options()))}")
            where = {"environment": option.variable, "flag": option.flag}.get(origin, origin)
            values[key] = option.parse(raw, where)
    config = msgspec.convert(_nested(values), Config)
    if not config.run_dir:
        config = msgspec.structs.replace(config, run_dir=default_run_dir(config.cluster, environ))
    if config.api_keys is not None:
        config = msgspec.structs.replace(config, api_keys=os.path.abspath(config.api_keys))
    _check(config)
    return config


def _from_file(file: str) -> dict[str, Any]:
    try:
        data = Path(file).read_text("utf-8")
        tree = json.loads(data) if file.endswith(".json") else tomllib.loads(data)
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config file {file}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {file}: not a table of keys")
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def _from_environment(environ: Environment) -> dict[str, str]:
    keys = {option.variable: key for key, option in options().items()}
    found: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable in _LAUNCH_VARIABLES:
            continue
        if variable not in keys:
            raise ConfigError(f"{variable} (environment): unknown variable{_suggestion(variable, list(keys))}")
        found[keys[variable]] = environ[variable]
    return found


def _suggestion(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    return tree


def _check(config: Config) -> None:
    """What no single field can say."""
    if config.block_tokens % config.page_tokens:
        raise ConfigError(f"page_tokens = {config.page_tokens}: does not divide block_tokens = {config.block_tokens}")
    if config.kv_tokens is not None and config.kv_tokens < config.block_tokens:
        raise ConfigError(f"kv_tokens = {config.kv_tokens}: less than one block of {config.block_tokens} tokens")
    if (config.tls.cert is None) != (config.tls.key is None):
        raise ConfigError("tls.cert and tls.key: only one of them is set")
    if (config.store_ssd is None) != (config.store_ssd_dir is None):
        raise ConfigError("store_ssd and store_ssd_dir: only one of them is set")
    if config.store_ssd_dir is not None and not os.path.isabs(config.store_ssd_dir):
        raise ConfigError(f"store_ssd_dir = {config.store_ssd_dir!r}: must be an absolute path")
    if config.store_ssd is not None and config.store_ssd < STORE_SSD_BYTES_MIN:
        raise ConfigError(f"store_ssd = {config.store_ssd}: must be at least {format_bytes(STORE_SSD_BYTES_MIN)}")
    parse_quotas(config.store_quotas)
    parse_origins(config.cors_origins)
    if config.otlp_endpoint is not None and not config.otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"otlp_endpoint = {config.otlp_endpoint!r}: must begin with http:// or https://")
    if not os.path.isabs(config.run_dir):
        raise ConfigError(f"run_dir = {config.run_dir!r}: must be an absolute path")
    socket_address(config.run_dir, "conductor")


def save_config(config: Config, path: Path) -> None:
    """Write all values, the token too, so that only the user can read them and a reader never sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(config)) + b"\n")
    os.replace(file.name, path)


# ---------------------------------------------------------------- addresses and launch


def default_run_dir(cluster: str, environ: Environment) -> str:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.access(runtime, os.W_OK):
        return f"{runtime}/mooncake-{cluster}"
    return f"/tmp/mooncake-{os.getuid()}-{cluster}"


def socket_address(run_dir: str, name: str) -> str:
    """Where the process of that name listens on one machine."""
    path = f"{run_dir}/{name}.sock"
    if len(path.encode()) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(f"run_dir = {run_dir!r}: too long, {path} has more than {SOCKET_PATH_BYTES_MAX} bytes")
    return f"unix:{path}"


def read_launch(environ: Environment | None = None) -> Launch:
    environ = os.environ if environ is None else environ
    numbers: list[int | None] = []
    for variable in (STATUS_FD, SUPERVISOR_PID):
        text = environ.get(variable, "")
        if text and not text.isdecimal():
            raise ConfigError(f"{variable} = {text!r} (environment): expected a number")
        numbers.append(int(text) if text else None)
    return Launch(*numbers)


def threads_per_instance(config: Config) -> int:
    cores = len(os.sched_getaffinity(0))
    return config.threads or max(1, cores // (config.prefill + config.decode))


def set_engine_environment(config: Config) -> None:
    for name, value in engine_environment(config).items():
        os.environ.setdefault(name, value)


def engine_environment(config: Config) -> dict[str, str]:
    """Must be set before torch is loaded. Threads that spin while they wait for work collapse a decode step from 35 ms
    to seconds when pools share cores, hence passive."""
    threads = str(threads_per_instance(config))
    variables = {
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return variables | _VLLM_ENVIRONMENT if config.engine == "vllm" else variables


def cores_of_instance(config: Config, index: int) -> list[int]:
    """Of this machine's processors, those of the instance with that number among all. Instances share them if there are too
    few."""
    cores, count = sorted(os.sched_getaffinity(0)), threads_per_instance(config)
    return [cores[(index * count + at) % len(cores)] for at in range(min(count, len(cores)))]


def child_environment(variables: Mapping[str, str], environ: Environment | None = None) -> dict[str, str]:
    """This process's environment for a child, without MOONCAKE_* variables: the child reads the resolved configuration file."""
    environ = os.environ if environ is None else environ
    kept = {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}
    return {**kept, **variables}
