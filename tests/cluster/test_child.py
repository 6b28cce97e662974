"""A role process: its signals, its exit codes, and what it tells the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mooncake.cluster.run_dir import ProcessId
from mooncake.status import Phase, StatusLine

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import asyncio, logging, os, sys, time, types
from mooncake.cluster.child import run_service, start_child
from mooncake.config import load_config, read_launch, RoleConfig
from mooncake.core.errors import *

async def run(config, role, status, registry):
    status.ready()
    {body}

sys.modules["mooncake.store.service"] = types.SimpleNamespace(run=run)
config = load_config(None, {{"timeouts.drain_s": "0.1"}}, {{}})
status = start_child(read_launch(), "info")
import mooncake.cluster.child as child
child.EXIT_MARGIN_S = 0.2
sys.exit(run_service(config, RoleConfig("store", "node-0", "", "", "node-0", ""), status))
"""


class Role:
    """A running role with `body` as its service."""

    def __init__(self, body: str, supervisor_pid: int | None = None) -> None:
        read_fd, write_fd = os.pipe()
        env = {"PATH": "/bin", "PYTHONPATH": str(ROOT), "MOONCAKE_STATUS_FD": str(write_fd)}
        env["MOONCAKE_SUPERVISOR_PID"] = str(supervisor_pid or os.getpid())
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(body=body.replace("\n", "\n    "))],
            env=env,
            pass_fds=(write_fd,),
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(write_fd)
        self._pipe = os.fdopen(read_fd, "rb")

    def until_ready(self) -> None:
        while StatusLine.unpack(self._pipe.readline()).stage is not Phase.READY:
            pass

    def end(self) -> tuple[int, list[StatusLine], str]:
        """Exit code, the status lines not read yet, and the log."""
        _, log = self.process.communicate(timeout=20)
        with self._pipe as pipe:
            return self.process.returncode, [StatusLine.unpack(line) for line in pipe], log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_drains_and_exits_0(number: signal.Signals) -> None:
    role = Role("try: await asyncio.sleep(60)\nfinally: status.draining('1 request'); await asyncio.sleep(0.01)")
    role.until_ready()
    role.process.send_signal(number)
    assert role.end() == (0, [StatusLine(Phase.DRAINING, "1 request")], "")


def test_a_drain_that_hangs_is_ended_hard() -> None:
    role = Role("try: await asyncio.sleep(60)\nfinally: time.sleep(60)")
    role.until_ready()
    role.process.terminate()
    assert role.end()[0] == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("ConfigError('port = 1: taken')", 2),
        ("ModelError('x: refused')", 2),
        ("SegmentError('no room')", 2),
        ("RpcError('gone')", 1),
    ],
)
def test_our_errors_are_a_sentence_without_traceback(error: str, code: int) -> None:
    found, lines, log = Role(f"raise {error}").end()
    text = error.split("'")[1]
    assert found == code
    assert lines[-1] == StatusLine(Phase.FAILED, f"node-0: {text}")
    assert "Traceback" not in log


def test_other_errors_leave_a_traceback_in_the_log() -> None:
    code, lines, log = Role("raise KeyError('x')").end()
    assert code == 1
    assert lines[-1] == StatusLine(Phase.FAILED, "node-0: KeyError: 'x'")
    assert "Traceback" in log


def test_warnings_reach_the_screen_and_the_log() -> None:
    _, lines, log = Role("logging.getLogger('mooncake.x').warning('disk %s', 'slow'); logging.info('quiet')").end()
    assert lines[-1] == StatusLine(Phase.WARNING, "disk slow")
    assert "WARNING mooncake.x: disk slow" in log
    assert "quiet" in log


def test_threads_that_wait_do_not_spin() -> None:
    _, lines, _ = Role("status.loading(os.environ['OMP_WAIT_POLICY'])").end()
    assert lines[-1].detail == "passive"


def test_it_does_not_outlive_a_supervisor_that_died_before_it_looked() -> None:
    role = Role("await asyncio.sleep(60)", supervisor_pid=1)
    assert role.end()[0] == -signal.SIGTERM


def test_it_dies_with_its_supervisor(tmp_path: Path) -> None:
    parent = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import os, time; from mooncake.cluster.child import die_with; "
        f'die_with(os.getppid()); open("{tmp_path}/up", "w").close(); time.sleep(60)\'])\n'
        "print(child.pid, flush=True); time.sleep(60)"
    )
    env = {"PATH": "/bin", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        deadline = time.monotonic() + 20
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    while ProcessId.of(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ProcessId.of(child) is None
