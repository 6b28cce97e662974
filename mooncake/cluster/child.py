"""Runs one role in this process: logging, signals, and the promise to end with the supervisor.

A role is a coroutine `run(config, role, status, registry)` in its room's service file, or in `cluster.instance`. It is
cancelled when the process is told to stop (SIGTERM, or SIGINT when started by hand) and then drains within timeouts.drain_s; a
process that still lives EXIT_MARGIN_S later exits hard, so that no fault in a drain keeps it alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

import uvloop

from mooncake.config import Config, Launch, RoleConfig, ServiceRole, set_engine_environment
from mooncake.core.errors import ConfigError, ModelError, MooncakeError, SegmentError
from mooncake.core.garbage import GC_THRESHOLDS
from mooncake.metrics import Registry
from mooncake.rpc.http import serving_metrics
from mooncake.status import Status, StatusHandler, die_with

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG = 0, 1, 2
EXIT_MARGIN_S = 3.0
_SERVICES: dict[ServiceRole, str] = {
    "conductor": "mooncake.scheduler.service",
    "prefill": "mooncake.cluster.instance",
    "decode": "mooncake.cluster.instance",
    "store": "mooncake.store.service",
    "directory": "mooncake.store.directory.service",
    "frontend": "mooncake.frontend.service",
}


class Service(Protocol):
    """Must report `status.ready()` once it serves; must return or raise only when it can serve no longer. registry: for its
    metrics."""

    async def __call__(self, config: Config, role: RoleConfig, status: Status, registry: Registry) -> None: ...


def exit_code(error: MooncakeError) -> int:
    """2 for what a restart cannot mend."""
    return EXIT_BAD_CONFIG if isinstance(error, ConfigError | ModelError | SegmentError) else EXIT_FAILED


def start_child(launch: Launch, log_level: str) -> Status:
    """First thing in a process of the cluster."""
    if launch.supervisor_pid is not None:
        die_with(launch.supervisor_pid)
    status = Status(launch.status_fd)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if launch.status_fd is not None:
        handlers.append(StatusHandler(status))
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=log_level.upper(), format=form, handlers=handlers)
    return status


def run_service(config: Config, role: RoleConfig, status: Status) -> int:
    """The role's whole life; gives the exit code."""

    def live() -> None:
        service: Service = importlib.import_module(_SERVICES[role.role]).run
        gc.freeze()  # what imports made stays
        gc.set_threshold(*GC_THRESHOLDS)
        uvloop.run(_until_told(lambda: measured(service), config.timeouts.drain_s + EXIT_MARGIN_S))

    async def measured(service: Service) -> None:
        registry = Registry()
        async with serving_metrics(registry, role.metrics):
            await service(config, role, status, registry)

    set_engine_environment(config)
    status.starting()
    return run_reporting(role.name, live, status)


def run_reporting(name: str, work: Callable[[], None], status: Status) -> int:
    """Do the work; an error becomes a sentence for the supervisor's screen, a line in the log, and an exit code."""
    log = logging.getLogger("mooncake")
    try:
        work()
    except MooncakeError as error:
        status.failed(f"{name}: {error}")
        log.critical("%s", error)
        return exit_code(error)
    except Exception as error:
        status.failed(f"{name}: {type(error).__name__}: {error}")
        log.critical("%s failed", name, exc_info=True)
        return EXIT_FAILED
    return EXIT_OK


async def _until_told(start: Callable[[], Awaitable[None]], bound_s: float) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(start())

    def stop() -> None:
        if task.cancel():
            watchdog = threading.Timer(bound_s, os._exit, (EXIT_FAILED,))
            watchdog.daemon = True
            watchdog.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await task
