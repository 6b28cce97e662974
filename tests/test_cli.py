"""The command as users meet it: help, and one clear sentence with exit code 2 for what they did wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mooncake.config import options
from mooncake.core.event_log import EventLogWriter
from mooncake.core.types import NANOS_PER_S
from mooncake.store.core import StoreCore
from mooncake.store.events import Commit, Reserve, Tick
from mooncake.store.service import StoreSettings


def mooncake(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOONCAKE_")}
    return subprocess.run(
        [sys.executable, "-m", "mooncake", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "COLUMNS": "200", **variables},
        cwd=Path(__file__).parent.parent,
        check=False,
    )


def fails(*arguments: str, **variables: str) -> str:
    """The one sentence that it fails with."""
    done = mooncake(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr.rstrip("\n")


def test_help_shows_every_option_but_secrets() -> None:
    done = mooncake("serve", "--help")
    assert done.returncode == 0
    for option in options().values():
        assert (option.flag + " " in done.stdout) == (option.key != "token")


def test_every_role_has_a_command() -> None:
    done = mooncake("--help")
    assert all(role in done.stdout for role in ("serve", "conductor", "prefill", "decode", "store", "frontend"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("serve", "--prefill", "none"), "mooncake: prefill = 'none' (--prefill): expected `int`, got `str`"),
        (("serve", "--config", "/nowhere.toml"), "mooncake: config file /nowhere.toml: No such file or directory"),
        (("serve", "--prefil", "2"), "mooncake: unrecognized arguments: --prefil 2"),
        (
            ("decode",),
            "mooncake: token: not set; processes of one cluster share one (MOONCAKE_TOKEN or the configuration file)",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # of a short name, as sockets will lie in it
        assert fails(*arguments, XDG_RUNTIME_DIR=folder) == sentence


def test_bad_variable_is_one_sentence() -> None:
    assert fails("serve", MOONCAKE_PORT="tcp://10.0.0.1:80").startswith(
        "mooncake: port = 'tcp://10.0.0.1:80' (MOONCAKE_PORT):"
    )


def test_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = fails("serve", "--port", port, "--run-dir", str(tmp_path / "run"), "--cluster", "test-port")
    assert sentence == f"mooncake: port = {port} on host 127.0.0.1: Address already in use"


def test_folder_of_somebody_else_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    sentence = fails("serve", "--run-dir", str(tmp_path / "link"))
    assert sentence == f"mooncake: run_dir = '{tmp_path}/link': not a folder of this user"


def test_missing_model_is_one_sentence(tmp_path: Path) -> None:
    done = mooncake(
        "serve",
        "--model",
        "/nowhere/model",
        "--port",
        "0",
        "--run-dir",
        str(tmp_path / "run"),
        "--cluster",
        "test-model",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/nowhere/model" in done.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "logs"]


def test_foreign_package_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "mooncake_transfer_engine_cuda13-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mooncake-transfer-engine-cuda13\nVersion: 0.3\n")
    sentence = fails("serve", PYTHONPATH=str(tmp_path))
    assert sentence == (
        "mooncake: mooncake-transfer-engine-cuda13 is installed here under our import name; "
        "uninstall it or use another environment"
    )


def store_log(path: Path, epoch: int = 1) -> None:
    """epoch: that the log claims; the core's is 1, and its reports say so."""
    core = StoreCore(1 << 16, epoch=1, last_number=epoch)
    writer = EventLogWriter(path.open("wb"), "store", 0, StoreSettings(1 << 16, epoch, 4096))
    for seconds, event in enumerate(
        (Reserve(1, 1, (b"a" * 24,), (100,)), Commit(1, 2, (epoch + 1,), lease=True), Tick())
    ):
        now = seconds * NANOS_PER_S
        writer.append(now, event, core.handle(event, now))
    writer.close()


def test_logs_are_replayed_and_what_they_still_held_is_shown(tmp_path: Path) -> None:
    store_log(tmp_path / "a.log")
    store_log(tmp_path / "b.log")
    done = mooncake("replay-log", f"{tmp_path}/a.log", f"{tmp_path}/b.log")
    outcome = "store: 3 events gave the same commands; still held: leases: 1"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/a.log: {outcome}\n{tmp_path}/b.log: {outcome}\n"


def test_a_log_that_says_something_else_is_named_with_the_first_difference(tmp_path: Path) -> None:
    store_log(tmp_path / "a.log", epoch=2)
    store_log(tmp_path / "b.log")
    done = mooncake("replay-log", f"{tmp_path}/a.log", f"{tmp_path}/b.log")
    assert (done.returncode, done.stderr) == (1, "")
    [first, second] = done.stdout.splitlines()
    assert first == f"{tmp_path}/a.log: event 2, Tick(): command 0, Report.epoch: 1 in the log, 2 now"
    assert second.startswith(f"{tmp_path}/b.log: store: 3 events")


def test_a_file_that_is_no_event_log_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("what happened on Tuesday\n")
    assert fails("replay-log", str(path)) == f"mooncake: {path}: not an event log: a frame of 1952540791 bytes"
    assert fails("replay-log", f"{path}x") == f"mooncake: {path}x: No such file or directory"


def test_keys_from_the_command_line(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    added = mooncake("keys", "add", "--tenant", "acme", "--weight", "2", "--expires", "30d", MOONCAKE_API_KEYS=path)
    assert added.returncode == 0 and "shown once" in added.stderr
    key = added.stdout.strip()
    limited = mooncake("keys", "limit", "--api-keys", path, "--tenant", "acme", "--requests-per-minute", "60")
    assert limited.stdout == "tenant acme: weight 2, requests per minute 60, priority max 0\n"
    key_id = key.split("-")[1]
    assert mooncake("keys", "revoke", key_id, "--api-keys", path).stdout == f"key {key_id} of tenant acme is revoked\n"
    shown = mooncake("keys", "list", "--api-keys", path).stdout
    assert f"{key_id}  acme    revoked" in shown and key.split("-")[2] not in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("list",), "mooncake: api_keys: not set; name the key file by --api-keys FILE"),
        (
            ("list", "--api-keys", "/nowhere/keys.json"),
            "mooncake: key file /nowhere/keys.json: No such file or directory",
        ),
        (
            ("add", "--api-keys", "{}", "--tenant", "x", "--weight", "0"),
            "mooncake: weight = 0.0: expected `float` >= 0.001",
        ),
        (
            ("add", "--api-keys", "{}", "--tenant", "x", "--expires", "soon"),
            "mooncake: --expires 'soon': expected such as 12h, 30d or 2027-01-31",
        ),
    ],
)
def test_keys_say_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    path = tmp_path / "keys.json"
    assert fails("keys", *(argument.replace("{}", str(path)) for argument in arguments)) == sentence
    assert not path.exists()
