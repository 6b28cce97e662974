"""The command as users meet it: help, and one clear sentence with exit code 2 for what they did wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake.config import options


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
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    assert fails(*arguments, XDG_RUNTIME_DIR=str(tmp_path)) == sentence


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
