"""`mooncake serve` as a process: its screen, Ctrl-C, its lock, and what a killed one leaves to the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mooncake.cluster.local import all_quotas
from mooncake.cluster.run_dir import ProcessId, open_run_dir
from mooncake.config import load_config
from mooncake.core.errors import ConfigError
from mooncake.frontend.keys import TenantChanges, add_key

ROOT = Path(__file__).parent.parent.parent


class Serve:
    """A running fake_serve; the screen is read from a file, so that no pipe fills up."""

    def __init__(self, folder: Path, behaviours: str = "", number: int = 0) -> None:
        self.run_dir = folder / "run"
        self._out = folder / f"screen-{number}"
        arguments = (
            "--run-dir",
            str(self.run_dir),
            "--cluster",
            f"test-{os.getpid()}",
            "--port",
            "0",
            "--timeouts-drain-s",
            "0.2",
        )
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "fake_serve.py"), behaviours, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
            )

    @property
    def screen(self) -> str:
        return self._out.read_text()

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.screen:
            assert time.monotonic() < deadline, self.screen
            assert self.process.poll() is None, self.screen
            time.sleep(0.01)

    def wait(self) -> int:
        return self.process.wait(30)

    def pids(self) -> dict[str, int]:
        found = msgspec.json.decode((self.run_dir / "processes.json").read_bytes(), type=dict[str, ProcessId])
        return {name: process.pid for name, process in found.items()}

    def left(self) -> list[str]:
        return sorted(path.name for path in self.run_dir.iterdir())


@pytest.fixture
def started() -> Iterator[list[Serve]]:
    """Whatever a failing test leaves running is ended by pid."""
    serves: list[Serve] = []
    yield serves
    for serve in serves:
        if serve.process.poll() is None:
            serve.process.kill()
            serve.process.wait()


def wait_gone(pids: dict[str, int]) -> None:
    deadline = time.monotonic() + 10
    while any(ProcessId.of(pid) for pid in pids.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_screen_then_a_clean_stop(tmp_path: Path, started: list[Serve], number: signal.Signals) -> None:
    started.append(serve := Serve(tmp_path))
    serve.until("curl")
    pids = serve.pids()
    table = [line.split() for line in serve.screen.splitlines() if line.startswith("  ") and "unix:" in line]
    assert [row[0] for row in table] == ["node-0", "conductor", "prefill-0", "decode-0"]
    assert {row[0]: int(row[2]) for row in table}.items() <= pids.items()
    assert (serve.run_dir / "config.json").stat().st_mode & 0o777 == 0o600
    assert serve.run_dir.stat().st_mode & 0o777 == 0o700
    serve.process.send_signal(number)
    assert serve.wait() == 0
    wait_gone(pids)
    order = [line.split()[1] for line in (serve.run_dir / "stops").read_text().splitlines()]
    assert order[0] == "frontend-0"
    assert sorted(order[1:3]) == ["decode-0", "prefill-0"]
    assert order[3:] == ["conductor", "node-0"]
    assert serve.left() == ["lock", "logs", "stops"]


def test_second_instance_is_refused_and_the_first_lives_on(tmp_path: Path, started: list[Serve]) -> None:
    started.append(first := Serve(tmp_path))
    first.until("curl")
    started.append(second := Serve(tmp_path, number=1))
    assert second.wait() == 2
    cluster = f"test-{os.getpid()}"
    assert second.screen == (
        f"mooncake: cluster = '{cluster}': is running here already (process {first.process.pid}); "
        "stop it or choose another --cluster\n"
    )
    assert first.process.poll() is None
    assert len(list(first.run_dir.glob("*.sock"))) == 5
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 0


def test_killed_supervisor_takes_its_children_along_and_the_next_start_cleans_up(
    tmp_path: Path, started: list[Serve]
) -> None:
    started.append(first := Serve(tmp_path, "decode-0=deaf"))
    first.until("curl")
    pids = first.pids()
    first.process.kill()
    first.process.wait()
    wait_gone({name: pid for name, pid in pids.items() if name != "decode-0"})
    assert ProcessId.of(pids["decode-0"])
    started.append(second := Serve(tmp_path, number=1))
    second.until("curl")
    wait_gone(pids)
    second.process.send_signal(signal.SIGINT)
    assert second.wait() == 0
    assert second.left() == ["lock", "logs", "stops"]


def test_bad_configuration_of_a_child_ends_the_start(tmp_path: Path, started: list[Serve]) -> None:
    started.append(serve := Serve(tmp_path, "prefill-0=bad"))
    assert serve.wait() == 2
    assert serve.screen.splitlines()[-1] == "mooncake: prefill-0: weights = 'x': no good"
    assert "Traceback" not in serve.screen
    assert set(serve.left()) <= {"lock", "logs", "stops"}


def test_second_ctrl_c_hurries(tmp_path: Path, started: list[Serve]) -> None:
    started.append(serve := Serve(tmp_path, "node-0=deaf,prefill-0=deaf"))
    serve.until("curl")
    serve.process.send_signal(signal.SIGINT)
    serve.until("stopping")
    begun = time.monotonic()
    serve.process.send_signal(signal.SIGINT)
    assert serve.wait() == 0
    assert time.monotonic() - begun < 4
    assert "prefill-0    warning did not stop in time and was killed" in serve.screen


def test_logs_of_the_previous_start_are_kept_once(tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        with open_run_dir(str(tmp_path / "run"), "x") as run_dir:
            run_dir.log("store-0").write_text(text)
    assert (tmp_path / "run/logs/store-0.log").read_text() == "three"
    assert (tmp_path / "run/logs/store-0.log.1").read_text() == "two"


def test_a_process_with_a_reused_pid_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "30"]) as other:
        with open_run_dir(str(tmp_path / "run"), "x"):
            pass
        stranger = msgspec.json.encode({"decode-0": ProcessId(other.pid, 1)})
        (tmp_path / "run/processes.json").write_bytes(stranger)
        with open_run_dir(str(tmp_path / "run"), "x"):
            assert other.poll() is None
        other.kill()


def test_quotas_of_the_key_file_reach_the_store(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for tenant, store_bytes in (("a", 1000), ("b", 2000), ("c", None)):
        add_key(path, tenant, TenantChanges(store_bytes=store_bytes), 0, None, admin=False)
    given = {"store_quotas": "b=7,d=8", "api_keys": str(path)}
    assert all_quotas(load_config(None, given, {})) == "a=1000,b=7,d=8"
    assert all_quotas(load_config(None, {"store_quotas": "b=7KiB"}, {})) == "b=7168"
    assert all_quotas(load_config(None, {}, {})) == ""
    path.write_text("{")
    with pytest.raises(ConfigError, match=f"key file {path}"):
        all_quotas(load_config(None, given, {}))


def test_run_dir_must_be_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="File exists"), open_run_dir(str(tmp_path / "file"), "x"):
        pass
    with pytest.raises(ConfigError, match="No such file"), open_run_dir(str(tmp_path / "a/b"), "x"):
        pass
