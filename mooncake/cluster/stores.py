"""A store of its own on one machine: `mooncake store --nodes N`. A directory and its nodes, for programs that want a shared
cache and no serving."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mooncake.cluster.local import (
    STOP_MARGIN_S,
    handle_signals,
    metrics_address,
    metrics_option,
    refuse_foreign_package,
    shared_memory,
)
from mooncake.cluster.run_dir import RunDir, open_run_dir
from mooncake.cluster.screen import Screen
from mooncake.cluster.supervisor import Backoff, Child, ChildSpec, Supervisor
from mooncake.config import Config, child_environment, save_config, socket_address

DIRECTORY = "directory"
NODES_MAX = 64


def serve_stores(config: Config, num_nodes: int, screen: Screen) -> int:
    """Run until told to stop; gives the exit code. Raises ConfigError or ProcessError if the start fails."""
    refuse_foreign_package()
    with open_run_dir(config.run_dir, config.cluster) as run_dir, shared_memory(config.cluster):
        config = msgspec.structs.replace(config, token=config.token or secrets.token_hex(16))
        return asyncio.run(_serve(config, num_nodes, run_dir, screen))


def specs(config: Config, file: Path, num_nodes: int) -> list[ChildSpec]:
    """The directory first: nodes would find it later too."""
    directory = socket_address(config.run_dir, DIRECTORY)
    nodes = [(f"node-{number}", socket_address(config.run_dir, f"node-{number}")) for number in range(num_nodes)]
    return [
        _spec(file, DIRECTORY, DIRECTORY, directory, metrics_option(metrics_address(config, 0))),
        *[
            _spec(file, "store", name, where, ("--directory", directory, *metrics_option(metrics_address(config, at))))
            for at, (name, where) in enumerate(nodes, start=1)
        ],
    ]


def _spec(file: Path, role: str, name: str, where: str, more: tuple[str, ...]) -> ChildSpec:
    argv = (sys.executable, "-m", "mooncake", role, "--name", name, "--listen", where, *more, "--config", str(file))
    return ChildSpec(name, role, argv, where, child_environment({}), rank=int(role == "store"))


async def _serve(config: Config, num_nodes: int, run_dir: RunDir, screen: Screen) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    handle_signals(stop, hurry, screen)
    save_config(config, run_dir.config)
    children = specs(config, run_dir.config, num_nodes)
    screen.say(f"mooncake {config.cluster}: starting {len(children)} processes")
    supervisor = Supervisor(children, run_dir.log, screen.heard, run_dir.record, Backoff())
    await supervisor.run(
        stop,
        hurry,
        on_ready=lambda started: _say_ready(config, started, run_dir, screen),
        start_s=config.timeouts.start_s,
        grace_s=config.timeouts.drain_s + STOP_MARGIN_S,
    )
    screen.say(f"mooncake {config.cluster}: stopped")
    return 0


def _say_ready(config: Config, children: Sequence[Child], run_dir: RunDir, screen: Screen) -> None:
    screen.say(f"\nmooncake {config.cluster}: store\n")
    for child in children:
        screen.say(f"  {child.spec.name:<12} {child.pid:>8}  {child.spec.address}")
    screen.say(f"\n  token in {run_dir.config}\n  logs  {run_dir.path / 'logs'}\n  stop  Ctrl-C\n")
