"""Threads bear their names where the operating system shows them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mooncake.engine.threads import start_thread


@pytest.mark.parametrize(
    ("name", "shown"), [("kv-load", "kv-load"), ("a-name-longer-than-linux-keeps", "a-name-longer-t")]
)
def test_a_thread_runs_at_once_under_its_name(name: str, shown: str) -> None:
    found: list[str] = []

    def run() -> None:
        found.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().rstrip("\n"))

    thread = start_thread(name, run)
    thread.join(10)
    assert found == [shown]
    assert thread.name == name
    assert thread.daemon, "a process that ends does not wait for it"
