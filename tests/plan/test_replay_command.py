"""`mooncake replay` as users meet it: errors before anything runs, the files it writes, and the same bytes every time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake.cli import main
from mooncake.core.errors import ConfigError
from mooncake.plan.options import flag, parse_options, parse_slo, texts
from mooncake.plan.replay import LINES, PAGE, SUMMARY, check, replay_trace, target
from mooncake.plan.replay_text import report_text
from mooncake.sim.report import DEFINITIONS
from tests.plan.traces import write_trace

SMALL = ("--prefill", "2", "--decode", "2", "--slo", "ttft=1,tbt=0.1")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that it fails with."""
    with pytest.raises(SystemExit, match=r"^2$"):
        sys.exit(main(["replay", *arguments]))
    out = capsys.readouterr()
    assert not out.out
    assert out.err.count("\n") == 1
    return out.err.rstrip("\n")


# ------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prefill", "many"), "mooncake: prefill = 'many' (--prefill): expected `int`, got `str`"),
        (("--speed", "0"), "mooncake: speed = '0' (--speed): expected `float` > 0.0"),
        (("--slo", "ttft=fast"), "mooncake: slo = 'ttft=fast' (--slo): expected seconds, such as ttft=30,tbt=0.1"),
        (("--slo", "tpot=1"), "mooncake: slo = 'tpot=1' (--slo): expected seconds, such as ttft=30,tbt=0.1"),
        (("--jitter", "some"), "mooncake: jitter = 'some' (--jitter): expected seconds, or auto"),
        (
            ("--store-memory", "-"),
            "mooncake: store_memory = '-' (--store-memory): expected a size such as 512GiB or 1TiB",
        ),
        (
            ("--store-ssd", "much"),
            "mooncake: store_ssd = 'much' (--store-ssd): expected a size such as 512GiB or 1TiB",
        ),
        (("--reuse", "maybe"), "mooncake: reuse = 'maybe' (--reuse): expected on or off"),
        (("--decode", "0"), "mooncake: 8 prefill and 0 decode instances: each pool needs one at least"),
        (
            ("--colocated", "4", "--decode", "2"),
            "mooncake: --colocated: there are no pools of prefill and decode beside it",
        ),
        (("--model", "gpt"), "mooncake: model = 'gpt' (--model): not known; there are llama3-70b"),
        (
            ("--block-tokens", "9"),
            "mooncake: block_tokens = 9: neither a multiple nor a part of the trace's blocks of 512 tokens",
        ),
        (("--polic", "joint"), "mooncake: unrecognized arguments: --polic joint"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    out = tmp_path / "out"
    trace = write_trace(tmp_path / "trace.jsonl", 3)
    assert fails(capsys, str(trace), "--out", str(out), *arguments) == sentence
    assert not (out / LINES).exists()


def test_unknown_hardware_and_policy_name_those_there_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = str(write_trace(tmp_path / "trace.jsonl", 3))
    assert "there are a800x8, a100x8, h100x8, h200x8, b200x8" in fails(capsys, trace, "--hardware", "tpu")
    assert fails(capsys, trace, "--policy", "best").startswith("mooncake: policy = 'best' (--policy): ")


def test_the_whole_trace_is_checked_before_anything_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_trace(tmp_path / "trace.jsonl", 30)
    lines = path.read_text().splitlines()
    lines[28] = lines[28].replace("1500", "15000")
    path.write_text("\n".join(lines))
    sentence = fails(capsys, str(path), "--out", str(tmp_path / "out"))
    assert sentence.startswith(f"mooncake: trace {path}, line 29: hash_ids has 3 ids")
    assert not (tmp_path / "out").exists()
    assert "No such file" in fails(capsys, str(tmp_path / "nowhere"))
    assert "no trace of a known format" in fails(capsys, __file__)


def test_a_configuration_file_allows_no_other_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('block_tokens = 128\n[simulated]\nhardware = "h100"\n')
    trace = str(write_trace(tmp_path / "trace.jsonl", 3))
    sentence = fails(capsys, trace, "--cluster", str(file), "--hardware", "h200x8")
    assert sentence == f"mooncake: --hardware: the cluster is that of {file} (--cluster)"
    file.write_text("blocks = 1\n")
    assert fails(capsys, trace, "--cluster", str(file)).startswith(
        f"mooncake: blocks (config file {file}): unknown key"
    )


# ------------------------------------------------------------ results


def test_files_and_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace.jsonl"), tmp_path / "a" / "b"
    assert main(["replay", str(trace), *SMALL, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "2 prefill + 2 decode on a800x8, llama3-70b: policy joint, admission off" in shown.out
    assert all(word in shown.out for word in DEFINITIONS)
    assert sorted(path.name for path in out.iterdir()) == [PAGE, LINES, SUMMARY]
    lines = [json.loads(line) for line in (out / LINES).read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(40))
    summary = json.loads((out / SUMMARY).read_text())
    assert summary["requests"]["total"] == summary["requests"]["completed"] == 40
    assert summary["requests"]["effective"] == sum(line["effective"] for line in lines)
    # The first block is everybody's after the first request, the second one comes four times in ten seconds of each kind.
    assert summary["reuse"]["hit_rate_by_token"] == pytest.approx(
        sum(line["cached_tokens"] for line in lines) / 60_000, abs=1e-6
    )
    assert summary["setup"]["notes"][0].startswith("timestamps: as in the file, on a clock of 0.25 s")


def test_json_has_a_stable_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", 5)
    assert main(["replay", str(trace), *SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == 1
    assert list(report) == [
        "version", "setup", "requests", "service", "latency", "reuse", "prediction", "cost", "instances", "nodes", "links",
        "definitions",
    ]  # fmt: skip
    assert list(report["latency"]) == [
        "ttft_ms",
        "network_ms",
        "tbt_ms",
        "handover_ms",
        "itl_ms",
        "gap_ms",
        "latency_ms",
    ]
    assert list(report["latency"]["ttft_ms"]) == ["mean", "p50", "p90", "p99", "max"]
    assert list(report["reuse"]["tokens"]) == ["hbm", "dram_local", "dram_remote", "ssd", "computed"]
    assert sum(report["reuse"]["tokens"].values()) == 5 * 1500
    assert report["cost"]["num_gpus"] == 32
    assert report["cost"]["usd"] == pytest.approx(report["cost"]["gpu_hours"] * 3.5, abs=1e-3)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace.jsonl"), tmp_path / "out"
    assert main(["replay", str(trace), *SMALL, "--out", str(out), "--json"]) == 0
    page = (out / PAGE).read_text()
    assert not re.search(
        r"https?:|//|url\(|<script|<link|@import|<img|src=|href=", page.removeprefix("<!doctype html>")
    )
    assert "prefers-color-scheme:dark" in page
    for plot in ("TTFT", "TBT", "ITL", "Hit rate by tier", "Queue", "Requests and rejections", "Instances", "Links"):
        assert f">{plot}</h" in page
    num_strips = (
        4 * 3 + 3 * 3
    )  # instances; memory and both ways of the network, of the three nodes that sent or received
    assert page.count('<svg class="strip"') == num_strips
    assert "NaN" not in page and "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", page)


def test_a_page_of_requests_that_all_failed(tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace.jsonl", 3), tmp_path / "out"
    assert main(["replay", str(trace), *SMALL, "--kv-tokens", "1024", "--out", str(out), "--json"]) == 0
    summary = json.loads((out / SUMMARY).read_text())
    assert summary["requests"]["outcomes"] == {"too_long": 3}
    assert summary["latency"]["ttft_ms"]["p50"] is None
    assert "Nothing to show." in (out / PAGE).read_text()


def test_two_processes_with_other_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", 60, step_ms=40)
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [
            sys.executable,
            "-m",
            "mooncake",
            "replay",
            str(trace),
            *SMALL,
            "--jitter",
            "auto",
            "--out",
            str(out),
        ]
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        found.append([done.stdout, *((out / name).read_bytes() for name in (SUMMARY, LINES, PAGE))])
    assert found[0] == found[1]


def test_jitter_and_seed_change_arrivals_and_say_so(tmp_path: Path) -> None:
    path = str(write_trace(tmp_path / "trace.jsonl", 40, step_ms=1000))
    trace = check(path)
    assert trace.clock_step_s == 1.0
    given = {"prefill": "2", "decode": "2"}
    arrivals = []
    for more in ({}, {"jitter": "auto"}, {"jitter": "auto"}, {"jitter": "1", "seed": "1"}):
        lines: list[bytes] = []
        report = replay_trace(trace, parse_options(given | more), write=lines.append).report
        arrivals.append([json.loads(line)["arrival_ms"] for line in lines])
        spread = "moved to a random time within 1 s" in report.setup.notes[0]
        assert spread == bool(more)
    assert arrivals[0] == [1000.0 * number for number in range(40)]
    assert arrivals[1] == arrivals[2] != arrivals[3]
    assert all(0 <= found - own < 1000 for own, found in zip(arrivals[0], arrivals[1], strict=True))


def test_a_configuration_file_is_simulated_as_it_would_be_served(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'prefill = 3\ndecode = 2\nblock_tokens = 128\npolicy = "least_load"\nstore_memory = "4GiB"\n'
        '[slo]\nttft_s = 2.5\n[simulated]\nhardware = "h100"\n'
    )
    aim = target(parse_options({"cluster": str(file), "decode": "4"}))
    config = aim.config
    assert (config.prefill, config.decode, config.nodes, config.block_tokens) == (3, 4, 1, 128)
    assert (config.conductor.policy, config.node.capacity_bytes, aim.slo.ttft_ns) == (
        "least_load",
        4 << 30,
        2_500_000_000,
    )
    assert (aim.hardware, aim.usd_per_gpu_hour) == ("h100", 4.5)
    report = replay_trace(check(str(write_trace(tmp_path / "t", 6))), parse_options({"cluster": str(file)})).report
    assert report.requests.completed == 6
    assert report.setup.ttft_slo_s == 2.5
    assert "blocks of 128 tokens: what two prompts share within a block of 512 is not seen" in report.setup.notes


def test_colocated_instances_stall_decode_for_whole_prompts_and_less_for_chunks(tmp_path: Path) -> None:
    trace = check(str(write_trace(tmp_path / "trace.jsonl", 30, step_ms=500, tokens=1500, output=60)))
    whole, chunked = (
        replay_trace(trace, parse_options({"colocated": "1", "reuse": "off"} | more)).report.latency.gap_ms.max or 0.0
        for more in ({}, {"max_step_tokens": "512"})
    )
    # 1,500 tokens take 176 ms by the paper's model, 512 of them 60 ms.
    assert 180 < whole < 450
    assert 60 < chunked < 110


def test_an_ssd_tier_reaches_nodes_conductor_and_reports(tmp_path: Path) -> None:
    trace = check(str(write_trace(tmp_path / "t", 6)))
    given = {"prefill": "1", "decode": "1", "store_ssd": "2TiB", "ssd_rate": "12GiB"}
    config = target(parse_options(given)).config
    assert (config.node.ssd_bytes, config.node.ssd_bytes_per_s) == (2 << 40, 12 << 30)
    assert config.conductor.rates.ssd_bytes_per_s == 12 << 30
    outcome = replay_trace(trace, parse_options(given))
    assert "and an SSD tier of 2.2 TB, 12.9 GB/s" in report_text(outcome.report)
    assert "ssd_writes" in outcome.report.nodes[0].counters
    plain = replay_trace(trace, parse_options({}))
    assert "SSD tier" not in report_text(plain.report) and "ssd_writes" not in plain.report.nodes[0].counters
    with pytest.raises(ConfigError, match="--store-ssd: the cluster is that of"):
        target(parse_options({"cluster": "c.toml", "store_ssd": "1TiB"}))
    with pytest.raises(ConfigError, match="--store-ssd: 1048576 bytes; 16MiB are the least"):
        target(parse_options({"store_ssd": "1MiB"}))
    file = tmp_path / "c.toml"
    file.write_text('store_ssd = "8GiB"\nstore_ssd_dir = "/mnt/ssd"\n[rates]\nssd_bytes_per_s = "3GB"\n')
    config = target(parse_options({"cluster": str(file)})).config
    assert (config.node.ssd_bytes, config.node.ssd_bytes_per_s) == (8 << 30, 3e9)


def test_options_and_texts() -> None:
    assert [flag(name) for name in texts()][:3] == ["--cluster", "--prefill", "--decode"]
    sized = parse_options({"store_memory": "1TiB", "store_ssd": "16TiB", "ssd_rate": "20GiB"})
    assert (sized.store_memory, sized.store_ssd, sized.ssd_rate) == (1 << 40, 16 << 40, 20 << 30)
    slo = parse_slo("tbt=0.05")
    assert (slo.ttft_ns, slo.tbt_ns) == (None, 50_000_000)
