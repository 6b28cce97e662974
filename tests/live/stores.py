"""Store nodes and a directory as real processes, by hand: killed, stopped and started again one by one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from mooncake.store.api import Store
from mooncake.transport.shm import cleanup_stale
from tests.live.harness import ROOT, clean_environment

Found = TypeVar("Found")
TOKEN = "store-secret"
READY_S = 30.0
DEADLINE_S = 5.0


class Stores:
    """Each node has a folder of its own, so that its Unix socket can be hidden (`remote`): then clients reach it by TCP, as
    from another machine."""

    def __init__(self, memory: str = "64MiB") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mooncake-stores-"))
        self.cluster = f"s-{os.getpid()}-{self.folder.name[-8:].lower().replace('_', 'x')}"
        self.memory = memory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.directory: list[str] = []
        self.addresses: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        cleanup_stale(self.cluster)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_directory(self) -> None:
        port = self.directory[0].rpartition(":")[2] if self.directory else "0"
        [line] = self._start("directory", "directory", "--listen", f"tcp://127.0.0.1:{port}")
        self.directory = [line.rpartition("ready: ")[2].strip()]

    def start(self, name: str, *options: str, remote: bool = False) -> None:
        """remote: reachable by TCP only."""
        self._start(name, "store", "--listen", "tcp://127.0.0.1:0", "--directory", self.directory[0], *options)
        if remote:
            os.unlink(self.folder / name / f"{name}.sock")

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()

    def stop(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGCONT)

    def client(self, home: str, *, deadline_s: float = DEADLINE_S) -> Store:
        """Of a node whose socket is not hidden."""
        return Store.connect(
            [f"unix:{self.folder / home / home}.sock"],
            directory=self.directory,
            cluster=self.cluster,
            token=TOKEN,
            deadline_s=deadline_s,
        )

    def _start(self, name: str, role: str, *options: str) -> list[str]:
        folder = self.folder / name
        log = folder.with_suffix(".log")
        at = log.stat().st_size if log.exists() else 0
        argv = [sys.executable, "-m", "mooncake", role, "--name", name, "--run-dir", str(folder), *options]
        argv += ["--cluster", self.cluster, "--store-memory", self.memory]
        with log.open("ab") as out:
            environ = clean_environment() | {"MOONCAKE_TOKEN": TOKEN}
            self.processes[name] = subprocess.Popen(argv, stdout=out, stderr=out, env=environ, cwd=ROOT)

        def ready() -> list[str]:
            lines = log.read_text()[at:].splitlines()
            assert self.processes[name].poll() is None, f"{name}: {lines[-3:]}"
            return [line for line in lines if " ready" in line]

        return until(ready, READY_S)


def until(look: Callable[[], Found], within_s: float = 5.0) -> Found:
    """What it gives when that is true at last."""
    end = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)
    return found
