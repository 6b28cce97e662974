"""The folder of a running cluster: lock, sockets, resolved configuration, logs, and who its processes are.

run_dir/lock             held (flock) by the supervisor for its whole life; contains its pid
run_dir/config.json      the resolved configuration with the cluster token; gone when the cluster is
run_dir/processes.json   pid and start time of every child, for a successor to end what a killed supervisor left
run_dir/NAME.sock        one per process
run_dir/logs/NAME.log    kept; the previous start's is NAME.log.1
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from mooncake.core.errors import ConfigError

LEFTOVER_GRACE_S = 3.0
"""Children of a killed supervisor are told to stop by the kernel; this is how long a successor waits before it kills them."""


class ProcessId(msgspec.Struct, frozen=True):
    """A process that a reused pid is not mistaken for."""

    pid: int
    started_ticks: int

    @staticmethod
    def of(pid: int) -> ProcessId | None:
        """None if there is no such process, or only its zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else ProcessId(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self


class RunDir:
    """Made by `open_run_dir`, which holds the lock meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self._processes = path / "processes.json"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def rotate_logs(self) -> None:
        logs = self.path / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        for log in logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    def record(self, pids: Mapping[str, int]) -> None:
        """Remember the children alive now; written whole or not at all."""
        found = {name: ProcessId.of(pid) for name, pid in pids.items()}
        draft = self._processes.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode({name: process for name, process in found.items() if process}))
        draft.replace(self._processes)

    def end_leftovers(self) -> list[str]:
        """End the children of a predecessor that was killed; gives their names."""
        try:
            recorded = msgspec.json.decode(self._processes.read_bytes(), type=dict[str, ProcessId])
        except (OSError, msgspec.DecodeError):
            return []
        left = {name: process for name, process in recorded.items() if process.alive}
        _end(list(left.values()))
        return sorted(left)

    def clear(self) -> None:
        """Remove everything that only a running cluster needs. The lock file stays: removing it would be a race."""
        for path in (*self.path.glob("*.sock"), self.config, self._processes):
            path.unlink(missing_ok=True)


def _end(processes: list[ProcessId]) -> None:
    for number, wait_s in ((signal.SIGTERM, LEFTOVER_GRACE_S), (signal.SIGKILL, LEFTOVER_GRACE_S)):
        for process in processes:
            if process.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        deadline = time.monotonic() + wait_s
        while any(process.alive for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)


@contextlib.contextmanager
def open_run_dir(path: str, cluster: str) -> Iterator[RunDir]:
    """Make the folder, take its lock, clean up after a killed predecessor; clean up at the end. Raises ConfigError."""
    folder = Path(path)
    make_private(folder)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take(lock, cluster)
        run_dir = RunDir(folder)
        run_dir.end_leftovers()
        run_dir.clear()
        run_dir.rotate_logs()
        try:
            yield run_dir
        finally:
            run_dir.clear()
            os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def make_private(folder: Path) -> None:
    """Sockets and the token lie there, and /tmp is everybody's: take only a real folder that is ours alone."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"run_dir = {str(folder)!r}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"run_dir = {str(folder)!r}: not a folder of this user")
    folder.chmod(0o700)


def _take(lock: int, cluster: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise ConfigError(
            f"cluster = {cluster!r}: is running here already (process {owner}); stop it or choose another --cluster"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
