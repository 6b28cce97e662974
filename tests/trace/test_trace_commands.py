"""`mooncake trace` as users meet it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mooncake.cli import main
from tests.trace.helpers import bailian_line, mooncake_line, written
from tests.trace.test_formats import AZURE, BURSTGPT

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *arguments: str) -> str:
    assert main(["trace", *arguments]) == 0
    done = capsys.readouterr()
    assert done.err == ""
    return done.out


def run_json(capsys: Captured, *arguments: str) -> Any:
    return json.loads(run(capsys, *arguments, "--json"))


def fails(capsys: Captured, *arguments: str) -> str:
    try:
        code = main(["trace", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    done = capsys.readouterr()
    assert (code, done.out) == (2, "") and done.err.count("\n") == 1
    return done.err.rstrip("\n")


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Four requests; two prompts of 2 blocks, each twice."""
    ids = ([1, 2], [3, 4], [1, 2], [3, 4])
    return str(written(tmp_path, *(mooncake_line(at * 500, 1000, 5, hash_ids=of) for at, of in enumerate(ids))))


def test_stats(capsys: Captured, small: str) -> None:
    out = run(capsys, "stats", small)
    assert out.startswith(f"{small}: mooncake format, blocks of 512 tokens\n")
    for row in (
        r"requests +4",
        r"span +1\.5 s",
        r"most requests within a second +2",
        r"input +1,000 +1,000 +1,000 +1,000 +1,000 +4,000",
        r"blocks, references to them +4, 8",
        r"blocks used once +0\.0000",
        r"hit rate by token +0\.5000",
        r"no limit( +0\.5000){6}",
    ):
        assert re.search(rf"^ +{row}$", out, re.MULTILINE), row


def test_stats_as_json(capsys: Captured, small: str) -> None:
    report = run_json(capsys, "stats", small)
    assert report["trace"] == {"path": small, "format": {"name": "mooncake", "block_tokens": 512}, "synthetic": False}
    assert report["stats"]["reuse"]["hit_rate_by_token"] == 0.5
    assert [row["policy"] for row in report["hit_rates"]] == ["lru", "lfu", "fifo", "s3fifo", "learned", "belady"]


def test_stats_without_prefixes_and_with_failures(capsys: Captured, tmp_path: Path) -> None:
    out = run(capsys, "stats", str(written(tmp_path, *BURSTGPT)))
    assert "1 failed requests, without output tokens, are left out" in out
    assert "reuse: unknown, the burstgpt format says nothing of prefixes" in out


def test_hit_rate(capsys: Captured, small: str) -> None:
    rows = run_json(capsys, "hit-rate", small, "--capacity", "2,4", "--policy", "lru,belady")["hit_rates"]
    assert [(row["capacity_blocks"], row["policy"], row["by_token"], row["by_block"]) for row in rows] == [
        (2, "lru", 0.0, 0.0),
        (2, "belady", 0.256, 0.25),
        (4, "lru", 0.5, 0.5),
        (4, "belady", 0.5, 0.5),
        (None, "lru", 0.5, 0.5),
        (None, "belady", 0.5, 0.5),
    ]
    in_tokens = run_json(capsys, "hit-rate", small, "--capacity", "2.1k", "--unit", "tokens", "--policy", "lru")[
        "hit_rates"
    ]
    assert [row["capacity_blocks"] for row in in_tokens] == [4, None]
    table = run(capsys, "hit-rate", small, "--capacity", "2").splitlines()
    assert [line.split() for line in table[-4:-1]] == [
        ["blocks", "tokens", "lru", "lfu", "fifo", "s3fifo", "learned", "belady*"],
        ["2", "1,024", "0.0000", "0.0000", "0.0000", "0.0000", "0.0000", "0.2560"],
        ["no", "limit", *["0.5000"] * 6],
    ]


def test_synth_of_a_source(capsys: Captured, small: str, tmp_path: Path) -> None:
    out = run(capsys, "synth", small, "--out", f"{tmp_path}/made.gz", "--requests", "40", "--seed", "3")
    assert out.startswith(f"wrote {tmp_path}/made.gz: mooncake format, seed 3\nshared prefixes: as in the source\n")
    assert re.search(r"^ +requests +4 +40$", out, re.MULTILINE)
    assert "synthetic: made by mooncake trace synth" in run(capsys, "stats", f"{tmp_path}/made.gz")


def test_synth_keeps_the_format_of_blocks(capsys: Captured, tmp_path: Path) -> None:
    source = written(tmp_path, *(bailian_line(chat, chat) for chat in range(3)))
    report = run_json(capsys, "synth", str(source), "--out", f"{tmp_path}/made")
    assert report["trace"]["format"]["name"] == "bailian"
    assert report["synthetic"]["reuse"]["hit_rate_by_token"] == report["source"]["reuse"]["hit_rate_by_token"]


def test_sharing_added_to_a_trace_without_prefixes_is_labelled(capsys: Captured, tmp_path: Path) -> None:
    source, made = str(written(tmp_path, *AZURE)), f"{tmp_path}/made"
    assert "shared prefixes: none\n" in run(capsys, "synth", source, "--out", made)
    out = run(capsys, "synth", source, "--out", made, "--hit-rate", ".4")
    assert "shared prefixes: made up, the azure format has none, to a hit rate of 0.4\n" in out
    assert '"synthetic":true' in Path(made).read_text()


def test_synth_from_parameters(capsys: Captured, tmp_path: Path) -> None:
    made = f"{tmp_path}/made"
    out = run(capsys, "synth", "--out", made, "--requests", ".5k", "--rate", "2", "--hit-rate", "0.5")
    assert "shared prefixes: made up, to a hit rate of 0.5\n" in out
    assert re.search(r"^ +hit rate by token, no limit +0\.5 +0\.[45]\d+$", out, re.MULTILINE)
    first = Path(made).read_bytes()
    run(capsys, "synth", "--out", made, "--requests", "500", "--rate", "2", "--hit-rate", "0.5")
    assert Path(made).read_bytes() == first


def test_bad_input_is_one_sentence(capsys: Captured, small: str, tmp_path: Path) -> None:
    azure = tmp_path / "azure"
    azure.write_text("\n".join(AZURE))
    for arguments, sentence in (
        (("stats", "/nowhere"), "mooncake: trace /nowhere: No such file or directory"),
        (
            ("stats", small, "--format", "csv"),
            "mooncake: trace format 'csv': not known; there are mooncake, bailian, azure, burstgpt",
        ),
        (
            ("hit-rate", small, "--policy", "mru"),
            "mooncake: policy = 'mru' (--policy): 'mru' is none of lru, lfu, fifo, s3fifo, learned, belady",
        ),
        (
            ("hit-rate", small, "--capacity", "1k,-5"),
            "mooncake: capacity = '1k,-5' (--capacity): '-5' is no count such as 1000, 30k or 1.5M",
        ),
        (
            ("hit-rate", small, "--capacity", "100", "--unit", "tokens"),
            "mooncake: capacity = '100' (--capacity): less than a block, of 512 tokens",
        ),
        (
            ("hit-rate", str(azure)),
            f"mooncake: trace {azure}: the azure format says nothing of prefixes, so nothing can be reused",
        ),
        (("synth", small, "--out", small), f"mooncake: out = {small!r} (--out): is the source"),
        (("synth", "--out", f"{tmp_path}/no/made"), f"mooncake: trace {tmp_path}/no/made: No such file or directory"),
        (("synth", "--out", "x", "--rate", "0"), "mooncake: rate = '0' (--rate): expected `float` > 0.0"),
        (("synth", "--out", "x", "--step-s", "x"), "mooncake: step_s = 'x' (--step-s): expected `float`, got `str`"),
        (("synth",), "mooncake trace synth: the following arguments are required: --out"),
        (("stats", small, "--cap"), "mooncake: unrecognized arguments: --cap"),
    ):
        assert fails(capsys, *arguments) == sentence
