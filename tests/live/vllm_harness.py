"""Stock vLLM servers for tests: `vllm serve` in its own environment (`make vllm-env`), with our connector or without any."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import pytest

from tests.live.harness import ROOT, clean_environment
from tests.live.stores import TOKEN, Stores

PYTHON = ROOT / ".venv-vllm/bin/python"
READY_S = 180.0
PAGE_TOKENS = 128
"""vLLM's own default on processors, and our block."""
KILLED_S = 5.0
_SERVER = "vllm.entrypoints.openai.api_server"
_SHOWN_LOG_CHARS = 4000

needs_vllm = pytest.mark.skipif(
    not list(PYTHON.parent.parent.glob(".ready-*")),
    reason="vLLM's environment is not there: `make vllm-env` makes it, where its wheels can be had",
)


class Answer(msgspec.Struct):
    """tokens: generated. num_cached: tokens of the prompt that were not computed."""

    tokens: list[int]
    num_cached: int
    params: dict[str, Any] | None = None


class VllmServer:
    """One engine. core: the processor that it computes on. connector: its --kv-transfer-config; None: without any."""

    def __init__(self, folder: Path, model: Path, core: int, connector: dict[str, Any] | None, *options: str) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"vllm-{self.port}.log"
        transfer = () if connector is None else ("--kv-transfer-config", json.dumps(connector))
        fixed = (
            *("--model", str(model), "--served-model-name", "m", "--dtype", "float32", "--port", str(self.port)),
            *("--enforce-eager", "--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", str(96 << 20)),
            *("--max-model-len", "4096", "--max-num-batched-tokens", "1024", "--enable-prompt-tokens-details"),
        )
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", str(core), str(PYTHON), "-m", _SERVER, *fixed, *transfer, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            assert self.process.poll() is None, self.log[-_SHOWN_LOG_CHARS:]
            assert time.monotonic() < deadline, self.log[-_SHOWN_LOG_CHARS:]
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)

    def kill(self) -> None:
        """kill -9 of the server and the engine that it started, and until they are gone. Python's tracker of semaphores, in
        their process group too, then frees theirs."""
        for pid in _engine_pids(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + KILLED_S
        while _engine_pids(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    # ------------------------------------------------------------ requests

    async def complete(self, prompt: Sequence[int], max_tokens: int, params: dict[str, Any] | None = None) -> Answer:
        """Greedy, to the full length."""
        body = {
            "model": "m", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **({"kv_transfer_params": params} if params else {}),
        }  # fmt: skip
        async with httpx.AsyncClient(timeout=90) as http:
            answer = await http.post(f"{self.url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        details = found["usage"].get("prompt_tokens_details") or {}
        return Answer(
            found["choices"][0]["token_ids"], details.get("cached_tokens") or 0, found.get("kv_transfer_params")
        )

    async def complete_all(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
        return list(await asyncio.gather(*(self.complete(prompt, max_tokens) for prompt in prompts)))

    # ------------------------------------------------------------ what it holds

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=5).text
        values = re.findall(rf"^vllm:{name}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE)
        assert values, f"no metric vllm:{name}"
        return sum(map(float, values))

    def until_idle(self, timeout_s: float = 15.0) -> None:
        """Until no request runs or waits and no page is held."""
        deadline = time.monotonic() + timeout_s
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(self.metric(name) for name in names):
            held = {name: self.metric(name) for name in names}
            assert time.monotonic() < deadline, f"still held: {held}\n{self.log[-_SHOWN_LOG_CHARS:]}"
            time.sleep(0.05)


def connector(stores: Stores, role: str, **extra: Any) -> dict[str, Any]:
    """The cluster of these nodes; the token comes by the environment."""
    return {
        "kv_connector": "MooncakeKvConnector",
        "kv_connector_module_path": "mooncake.engine.vllm.connector",
        "kv_role": role,
        "kv_connector_extra_config": {"directory": stores.directory, "cluster": stores.cluster, **extra},
    }


async def through_pair(
    prefill: VllmServer, decode: VllmServer, prompt: Sequence[int], max_tokens: int
) -> tuple[Answer, Answer]:
    """As a router does: the first token from the one, then all from the other."""
    first = await prefill.complete(prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False})
    return first, await decode.complete(prompt, max_tokens, first.params)


def _environment() -> dict[str, str]:
    return {
        **clean_environment(),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "MOONCAKE_TOKEN": TOKEN,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _engine_pids(group: int) -> list[int]:
    """Of that process group, who lives, but for Python's tracker of semaphores."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    found = [line.split(None, 3) for line in listed.splitlines()]
    return [
        int(pid)
        for pid, its_group, state, command in found
        if int(its_group) == group and not state.startswith("Z") and "resource_tracker" not in command
    ]
