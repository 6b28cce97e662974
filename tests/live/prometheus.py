"""Prometheus for tests: the machine's, or Debian's package unpacked into a folder; nothing is installed."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

_START_S = 20.0


def programs(folder: Path) -> dict[str, str]:
    """Paths of promtool and prometheus. Skips the test if they cannot be had."""
    names = ("promtool", "prometheus")
    found = {name: shutil.which(name) for name in names}
    if all(found.values()):
        return {name: str(path) for name, path in found.items()}
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("promtool and prometheus are not on PATH, and there is no apt-get to fetch them with")
    done = subprocess.run(
        ["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    packages = list(folder.glob("prometheus_*.deb"))
    if not packages:
        pytest.skip(f"promtool is not on PATH, and its package cannot be fetched: {done.stderr.strip()[-200:]}")
    subprocess.run(["dpkg", "-x", str(packages[0]), str(folder)], check=True, timeout=60)
    return {name: str(folder / "usr/bin" / name) for name in names}


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(20_000, 60_000, 50):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for port in range(first, first + count):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no free ports")


class Prometheus:
    """Scrapes the targets every 200 ms; a context manager."""

    def __init__(self, program: str, folder: Path, targets: Sequence[str]) -> None:
        port = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}}
        config["scrape_configs"] = [{"job_name": "mooncake", "static_configs": [{"targets": list(targets)}]}]  # type: ignore[assignment]
        file = folder / "prometheus.json"  # JSON is YAML
        file.write_text(httpx.Request("POST", self.url, json=config).content.decode())
        self._log = (folder / "prometheus.log").open("wb")
        argv = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
        argv.append(f"--web.listen-address=127.0.0.1:{port}")
        self._process = subprocess.Popen(argv, stdout=self._log, stderr=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series with their labels and value."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=5).json()
        assert answer["status"] == "success", answer
        return [{**each["metric"], "value": float(each["value"][1])} for each in answer["data"]["result"]]

    def until(self, expression: str, count: int) -> list[dict[str, Any]]:
        """Until it gives so many series."""
        deadline = time.monotonic() + _START_S
        found: Any = "no answer"
        while time.monotonic() < deadline:
            try:
                found = self.query(expression)
            except (httpx.TransportError, ValueError):  # it is starting
                found = "no answer"
            if len(found) == count:
                return list(found)
            time.sleep(0.1)
        raise AssertionError(f"{expression}: {found}, and not {count} series")
