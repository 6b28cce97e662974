"""A whole cluster on one machine: `mooncake serve`.

    check -> lock the run folder, clean up after a killed predecessor -> prepare the model once -> start all processes
          -> ready: one screen -> keep them alive -> stop: frontend, instances, Conductor, store -> free everything

Between processes everything goes over Unix sockets in the run folder; only the frontend has a TCP port.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mooncake.cluster.run_dir import RunDir, open_run_dir
from mooncake.cluster.screen import Screen, base_url
from mooncake.cluster.supervisor import EXIT_BAD_CONFIG, Backoff, Child, ChildSpec, Supervisor
from mooncake.config import (
    VLLM_CORES,
    Config,
    RoleConfig,
    ServiceRole,
    child_environment,
    cores_of_instance,
    engine_environment,
    format_quotas,
    load_config,
    parse_quotas,
    save_config,
    socket_address,
    threads_per_instance,
)
from mooncake.core.errors import ConfigError, ProcessError
from mooncake.frontend.keys import read_keys, store_quotas
from mooncake.transport.shm import cleanup_stale

NODE = "node-0"
STOP_MARGIN_S = 5.0
"""A child ends itself a little after timeouts.drain_s; only one that cannot is killed after this much more."""
_RANKS: dict[ServiceRole, int] = {"store": 0, "directory": 0, "conductor": 1, "prefill": 2, "decode": 2, "frontend": 3}
_FOREIGN = "mooncake-transfer-engine"


def serve(config: Config, screen: Screen) -> int:
    """Run until told to stop; gives the exit code. Raises ConfigError or ProcessError if the start fails."""
    refuse_foreign_package()
    with open_run_dir(config.run_dir, config.cluster) as run_dir, shared_memory(config.cluster):
        config = msgspec.structs.replace(
            config,
            port=_free_port(config),
            token=config.token or secrets.token_hex(16),
            threads=threads_per_instance(config),
            store_quotas=all_quotas(config),
        )
        return asyncio.run(_serve(config, run_dir, screen))


def all_quotas(config: Config) -> str:
    """`store_quotas` with those of the key file; what the option says of a tenant goes first. Raises ConfigError."""
    of_keys = {} if config.api_keys is None else store_quotas(read_keys(Path(config.api_keys)))
    return format_quotas(of_keys | parse_quotas(config.store_quotas))


def refuse_foreign_package() -> None:
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if name.startswith(_FOREIGN):
            raise ConfigError(
                f"{name} is installed here under our import name; uninstall it or use another environment"
            )


def roles(config: Config) -> list[RoleConfig]:
    """Every process of the cluster, in the order of starting."""
    names: list[tuple[ServiceRole, str]] = [("store", NODE), ("conductor", "conductor")]
    names += [("prefill", f"prefill-{index}") for index in range(config.prefill)]
    names += [("decode", f"decode-{index}") for index in range(config.decode)]
    names.append(("frontend", "frontend-0"))
    return [
        local_role(config, role, name, metrics=metrics_address(config, at)) for at, (role, name) in enumerate(names)
    ]


def metrics_address(config: Config, at: int) -> str:
    """Of the process that is started as that one, from 0."""
    return "" if config.metrics_port is None else f"127.0.0.1:{config.metrics_port + at}"


def local_role(config: Config, role: ServiceRole, name: str, node: str = NODE, metrics: str = "") -> RoleConfig:
    """A role with the addresses it has when everything runs on one machine."""
    where = base_url(config) if role == "frontend" else socket_address(config.run_dir, name)
    conductor = socket_address(config.run_dir, "conductor")
    return RoleConfig(role, name, where, conductor, node, socket_address(config.run_dir, node), metrics=metrics)


def child_spec(config: Config, file: Path, role: RoleConfig) -> ChildSpec:
    python = config.engine_python if role.role in ("prefill", "decode") else None
    addresses = ("--listen", role.listen, "--conductor", role.conductor, "--node", role.node, "--store", role.store)
    return ChildSpec(
        name=role.name,
        role=role.role,
        argv=(
            python or sys.executable,
            "-m",
            "mooncake",
            role.role,
            "--name",
            role.name,
            *addresses,
            *metrics_option(role.metrics),
            "--config",
            str(file),
        ),
        address=role.listen,
        env=child_environment(_environment(config, role)),
        rank=_RANKS[role.role],
    )


def metrics_option(address: str) -> tuple[str, ...]:
    return ("--metrics", address) if address else ()


def _environment(config: Config, role: RoleConfig) -> dict[str, str]:
    variables = engine_environment(config)
    if config.engine == "vllm" and role.role in ("prefill", "decode"):
        index = int(role.name.rpartition("-")[2]) + (config.prefill if role.role == "decode" else 0)
        variables[VLLM_CORES] = ",".join(map(str, cores_of_instance(config, index)))
    return variables


async def _serve(config: Config, run_dir: RunDir, screen: Screen) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    handle_signals(stop, hurry, screen)
    save_config(config, run_dir.config)
    screen.say(f"mooncake {config.cluster}: preparing {config.model}")
    if not await _prepare(config, run_dir, screen, stop, hurry):
        return 0
    config = load_config(str(run_dir.config), environ={})
    specs = [child_spec(config, run_dir.config, role) for role in roles(config)]
    screen.say(f"mooncake {config.cluster}: starting {len(specs)} processes, {config.threads} threads per instance")
    supervisor = Supervisor(specs, run_dir.log, screen.heard, run_dir.record, Backoff())
    await supervisor.run(
        stop,
        hurry,
        on_ready=lambda children: screen.ready(config, children, run_dir.path / "logs"),
        start_s=config.timeouts.start_s,
        grace_s=config.timeouts.drain_s + STOP_MARGIN_S,
    )
    screen.say(f"mooncake {config.cluster}: stopped")
    return 0


async def _prepare(config: Config, run_dir: RunDir, screen: Screen, stop: asyncio.Event, hurry: asyncio.Event) -> bool:
    """Fetch and convert the model in a process of its own, so that the supervisor never loads torch; that process writes
    where the model is into the configuration file. False if told to stop."""
    python = None if config.engine == "vllm" else config.engine_python  # vLLM's own has nothing that converts models
    argv = (python or sys.executable, "-m", "mooncake", "prepare", "--config", str(run_dir.config))
    spec = ChildSpec("model", "prepare", argv, "", child_environment(engine_environment(config)))
    child = Child(spec, run_dir.log("prepare"), screen.heard, Backoff())
    running, stopped = asyncio.create_task(child.run_once()), asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        await child.stop(STOP_MARGIN_S, hurry)
    stopped.cancel()
    code = await running
    if stop.is_set():
        return False
    if code:
        raise (ConfigError if code == EXIT_BAD_CONFIG else ProcessError)(child.sentence(code))
    return True


def handle_signals(stop: asyncio.Event, hurry: asyncio.Event, screen: Screen) -> None:
    def told() -> None:
        if stop.is_set():
            hurry.set()
            return
        screen.say("\nstopping; Ctrl-C again to hurry")
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, told)
    loop.add_signal_handler(signal.SIGTERM, told)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        loop.add_signal_handler(signal.SIGHUP, told)


@contextmanager
def shared_memory(cluster: str) -> Iterator[None]:
    """Free what a killed predecessor left, and at the end what killed children left."""
    cleanup_stale(cluster)
    try:
        yield
    finally:
        cleanup_stale(cluster)


def _free_port(config: Config) -> int:
    """The port itself if it can be had, or a free one for 0. The frontend binds it a moment later."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"port = {config.port} on host {config.host}: {error.strerror}") from None
