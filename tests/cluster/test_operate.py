"""The operator's commands against a frontend that answers, and against what is none."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mooncake.cli import main
from mooncake.cluster.status_text import table
from mooncake.config import load_config, save_config
from mooncake.core.messages import LoadReport
from mooncake.core.types import ReusedTokens
from mooncake.frontend.tokenizer import Tokenizer
from tests.frontend.conductor import Site, site
from tests.frontend.conftest import model_folder, tokenizer
from tests.scheduler.cluster import load

__all__ = ["model_folder", "tokenizer"]  # fixtures of the frontend's tests

Run = Callable[..., Awaitable[int]]


def against(tokenizer: Tokenizer, test: Callable[[Site, Run], Awaitable[None]]) -> None:
    """The command runs in a thread, while the frontend answers in the event loop."""

    async def check() -> None:
        async with site(tokenizer) as opened:

            async def command(*argv: str) -> int:
                return await asyncio.to_thread(main, [*argv, "--url", opened.server.url])

            await test(opened, command)

    asyncio.run(check())


def test_the_status_is_a_table_or_json(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    async def check(opened: Site, command: Run) -> None:
        await opened.complete("first")
        opened.cluster.tell("prefill-0", LoadReport(load("prefill-0", 1, reused=ReusedTokens(200, 100, 50, 20))))
        assert await command("status") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "mooncake test: tiny, frontend-0 ready, up 0 s"
        assert any(line.startswith("TTFT        100.0 % of 1 met their objective (by default 1.0 s)") for line in lines)
        assert (
            "hit rate    hbm 50.0 %, dram 25.0 %, ssd 10.0 % of 200 prompt tokens, since the instances started" in lines
        )
        head = next(at for at, line in enumerate(lines) if line.startswith("instance "))
        assert [line.split()[:3] for line in lines[head + 1 : head + 4]] == [
            ["prefill-0", "prefill", "ready"],
            ["decode-0", "decode", "ready"],
            ["decode-10", "decode", "ready"],
        ]
        assert await command("status", "--json") == 0
        assert json.loads(capsys.readouterr().out)["cluster"]["counts"] == {"placed": 1}

    against(tokenizer, check)


def test_it_is_watched_until_ctrl_c_even_while_nobody_answers(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        async with site(tokenizer) as opened:
            argv = ("status", "--watch", "--json", "--url", opened.server.url)
            pipe = asyncio.subprocess.PIPE
            watching = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "mooncake", *argv, stdout=pipe, stderr=pipe
            )
            assert watching.stdout is not None and watching.stderr is not None
            for _ in range(2):
                line = await asyncio.wait_for(watching.stdout.readline(), 30)
                assert json.loads(line)["name"] == "test"
        try:
            sentence = await asyncio.wait_for(watching.stderr.readline(), 30)
            assert sentence.startswith(b"mooncake: no frontend answers at ")
        finally:
            watching.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(watching.wait(), 30) == 130

    asyncio.run(check())


def test_a_redirect_is_not_followed_as_the_token_would_go_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str | None] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("location", "/other")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_request(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main(["status", "--url", url]) == 2
        thread.join()
    assert capsys.readouterr().err == f"mooncake: {url} is no Mooncake frontend: it answered with HTTP status 302\n"
    assert asked == ["/admin/status"]


def test_why_there_is_no_table_of_instances_is_said(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    async def check(opened: Site, command: Run) -> None:
        opened.cluster.silent = True
        assert await command("status") == 0
        assert "  the Conductor did not answer within 0.3 s\n" in capsys.readouterr().out

    against(tokenizer, check)


def test_draining_waits_until_nothing_is_left(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    async def check(opened: Site, command: Run) -> None:
        assert await command("drain", "decode-0", "--wait") == 0
        assert capsys.readouterr().out.splitlines() == ["decode-0 is drained", "decode-0 is drained"]
        assert await command("undrain", "decode-0") == 0
        assert capsys.readouterr().out == "decode-0 is ready\n"
        assert await command("drain", "decode-7") == 2
        assert "there is no instance 'decode-7'; there are: decode-0, decode-10, prefill-0" in capsys.readouterr().err

    against(tokenizer, check)


def test_what_is_not_drained_in_time_is_told_with_the_code_1(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check(opened: Site, command: Run) -> None:
        opened.cluster.core.view.instances["decode-0"].num_decodes += 2
        assert await command("drain", "decode-0", "--wait", "--timeout", "1") == 1
        assert capsys.readouterr().out.splitlines() == [
            "decode-0 is draining",
            "decode-0: 2 requests booked, 0 at it",
            "decode-0 is not drained after 1 s",
        ]

    against(tokenizer, check)


def test_a_request_is_explained_by_its_id(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    async def check(opened: Site, command: Run) -> None:
        await opened.complete("a/b?c=d&e")
        assert await command("explain", "a/b?c=d&e") == 0
        assert capsys.readouterr().out.startswith("a/b?c=d&e completed: 3 prompt tokens")
        assert await command("explain", "nobody's") == 2
        assert "nobody's" in capsys.readouterr().err

    against(tokenizer, check)


def test_the_run_folder_has_address_and_token(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check(opened: Site, command: Run) -> None:
        for token, code in (("the cluster's token", 0), ("another", 2)):
            flags = {"port": opened.server.port, "token": token, "run_dir": str(tmp_path)}
            save_config(load_config(flags=flags, environ={}), tmp_path / "config.json")
            assert await asyncio.to_thread(main, ["status", "--run-dir", str(tmp_path)]) == code
        assert "the key is not an operator's" in capsys.readouterr().err

    against(tokenizer, check)


def test_where_nobody_answers_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for argv in (["status"], ["drain", "decode-0"], ["undrain", "decode-0"]):
        assert main([*argv, "--url", url]) == 2
        assert capsys.readouterr().err == f"mooncake: no frontend answers at {url}: Connection refused\n"
    assert main(["explain", "request-7", "--url", url]) == 2
    assert capsys.readouterr().err.startswith(f"mooncake: request-7: is no file, and no frontend answers at {url}")
    assert main(["status", "--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mooncake: run_dir = {str(tmp_path)!r}: no cluster runs there\n"
    assert main(["status", "--url", "localhost:8000"]) == 2
    assert "must begin with http://" in capsys.readouterr().err


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    assert list(table(("name", ">n"), [("a", "5"), ("bcdef", "123")])) == ["name     n", "a        5", "bcdef  123"]
