"""Bad input at the doors of a real cluster: one clear sentence and exit code 2, or an error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.harness import MODEL, ROOT, Client, Cluster, clean_environment

KV_TOKENS = 2048
BODY_BYTES = 60_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    options = ("--kv-tokens", str(KV_TOKENS), "--store-memory", "16MiB", "--limits-body", str(BODY_BYTES))
    with Cluster("--engine", "simulated", *options) as found:
        yield found
        found.checkpoint("after bad requests")


def refused(tmp_path: Path, *arguments: str) -> str:
    """The sentence that `mooncake serve` ends with."""
    place = ("--run-dir", str(tmp_path / "run"), "--cluster", f"door-{tmp_path.name}"[:31].replace("_", "-"))
    done = subprocess.run(
        [sys.executable, "-m", "mooncake", "serve", "--engine", "simulated", "--port", "0", *place, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout
    return done.stderr.strip()


def test_port_of_a_running_cluster(cluster: Cluster, tmp_path: Path) -> None:
    port = str(cluster.config["port"])
    assert refused(tmp_path, "--port", port) == f"mooncake: port = {port} on host 127.0.0.1: Address already in use"


def test_a_second_cluster_of_the_same_name(cluster: Cluster, tmp_path: Path) -> None:
    sentence = refused(tmp_path, "--cluster", cluster.name, "--run-dir", str(cluster.run_dir))
    assert sentence == (
        f"mooncake: cluster = {cluster.name!r}: is running here already (process {cluster.process.pid}); "
        "stop it or choose another --cluster"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefil = 2", ("prefil", "unknown key", "did you mean prefill?")),
        ("[slo]\nttft = 1.0", ("slo.ttft", "unknown key")),
        ("decode = 0", ("decode = 0", ">= 1")),
        ('store_memory = "lots"', ("store_memory = 'lots'",)),
        ("block_tokens = 100", ("page_tokens = 32", "does not divide", "block_tokens = 100")),
        ("port = [1]", ("port = [1]",)),
        ("port = ", ("file",)),
    ],
)
def test_config_file(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    sentence = refused(tmp_path, "--config", str(file))
    assert str(file) in sentence or "does not divide" in sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--model", "/nowhere/model"), "/nowhere/model"),
        (("--model", "."), "no config.json"),
        (("--prefil", "2"), "--prefil"),
        (("--engine", "magic"), "engine = 'magic'"),
        (("--kv-tokens", "5"), "kv_tokens = 5"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--host", "192.0.2.1"), "192.0.2.1"),
        (("--store-memory", "1PiB"), "store_memory"),
        (("--store-memory", "900TiB"), "node-0: /dev/shm is too small"),
        (("--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"), "tls.cert = '/nowhere.pem'"),
    ],
)
def test_flags(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    assert word in refused(tmp_path, *arguments)


def test_port_taken_between_the_check_and_the_start(tmp_path: Path) -> None:
    """Also without a supervisor: a frontend alone says the same."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mooncake",
                "frontend",
                "--engine",
                "simulated",
                "--run-dir",
                str(tmp_path / "run"),
                "--port",
                str(taken.getsockname()[1]),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            env={**clean_environment(), "MOONCAKE_TOKEN": "secret"},
            cwd=ROOT,
            check=False,
        )
    assert done.returncode == 2
    assert "in use" in done.stderr and "Traceback" not in done.stderr


COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": [2000, 2001], "max_tokens": 4}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (COMPLETION | {"model": "other"}, 404, "model"),
        (COMPLETION | {"max_tokens": 0}, 400, "max_tokens"),
        (COMPLETION | {"temperature": 9}, 400, "temperature"),
        (COMPLETION | {"prompt": []}, 400, "prompt"),
        (COMPLETION | {"prompt": [-1]}, 400, "prompt"),
        (COMPLETION | {"prompt": [2000] * (KV_TOKENS + 1)}, 400, "prompt"),
        (COMPLETION | {"prompt": [2000] * 9000}, 400, "prompt"),
        (COMPLETION | {"prompt": "x" * BODY_BYTES}, 413, None),
    ],
)
def test_http(cluster: Cluster, body: Any, status: int, param: str | None) -> None:
    async def scenario() -> tuple[int, dict[str, Any]]:
        async with Client(cluster, timeout_s=10) as client:
            answer = await client.post("/v1/completions", body)
            return answer.status_code, json.loads(answer.content)["error"]

    code, error = asyncio.run(scenario())
    assert (code, error["param"]) == (status, param), error
    assert error["message"]
