"""Our reader of KV events against vLLM's own publisher, over its ZMQ sockets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.live.harness import ROOT, clean_environment
from tests.live.vllm_harness import PYTHON, needs_vllm

pytestmark = needs_vllm


def test_missed_batches_are_replayed_and_lost_ones_make_it_forget(tmp_path: Path) -> None:
    environ = clean_environment() | {"PYTHONPATH": os.fspath(ROOT)}
    command = [os.fspath(PYTHON), os.fspath(ROOT / "tests/live/vllm_feed_check.py"), os.fspath(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("right\n")
