"""aiperf and guidellm replay the first requests of the conversation trace, at its times, against the simulated engine.

Lengths are scaled down: prompts to a 32nd (blocks of 512 tokens to 16), outputs to an eighth, so that the longest prompt fits
the default model's context. Both tools make prompts from a line's block ids, so prefixes are shared as in the trace. Times are
as each tool reports them. Their environments are large (2 GB) and made at the first run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import MODEL, ROOT, Cluster, emit, finish
from environments import CannotBeHad, python_with

from mooncake.engine.models import resolve_model

TRACE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
PACKAGES = Path(__file__).resolve().parent / "loadgens"
PROMPT_SHARE, OUTPUT_SHARE = 32, 8
BLOCK_TOKENS = 512 // PROMPT_SHARE
TORCH = "torch==2.13.0+cpu"
"""guidellm wants torch; the ordinary build is several GB."""
RUN_S = 600.0
Figures = dict[str, float]


def scaled_trace(source: Path, folder: Path, num_requests: int, unit_ms: int) -> Path:
    """unit_ms: that of the timestamps that the tool reads."""
    file = folder / "trace.jsonl"
    with source.open() as given, file.open("w") as out:
        for line, _ in zip(given, range(num_requests), strict=False):
            row = json.loads(line)
            row["timestamp"] /= unit_ms
            row["input_length"] = math.ceil(row["input_length"] / PROMPT_SHARE)
            row["output_length"] = math.ceil(row["output_length"] / OUTPUT_SHARE)
            print(json.dumps(row), file=out)
    return file


def aiperf(python: Path, url: str, trace: Path, folder: Path) -> Figures:
    run(
        [
            *(str(python.with_name("aiperf")), "profile", "--url", url, "--model", MODEL, "--endpoint-type", "chat"),
            *("--streaming", "--tokenizer", cached_tokenizer(folder / "hub"), "--extra-inputs", "ignore_eos:true"),
            *("--input-file", str(trace), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"),
            *("--isl-block-size", str(BLOCK_TOKENS), "--output-artifact-dir", str(folder / "out"), "--ui", "none"),
        ],
        {"HF_HUB_CACHE": str(folder / "hub")},
    )
    found = json.loads((folder / "out" / "profile_export_aiperf.json").read_bytes())
    figures = {
        "requests": found["request_count"]["avg"],
        "errors": sum(each["count"] for each in found["error_summary"]),
    }
    for name, metric in (("ttft", found["time_to_first_token"]), ("itl", found["inter_token_latency"])):
        figures |= {f"{name}_ms_mean": metric["avg"], f"{name}_ms_p50": metric["p50"], f"{name}_ms_p95": metric["p95"]}
    return figures


def cached_tokenizer(cache: Path) -> str:
    """A name under which the model's tokenizer is found offline: aiperf's own processes take no folder."""
    repository = cache / f"models--mooncake--{MODEL}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("local")
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(resolve_model(MODEL).path, repository / "snapshots" / "local", ignore=weights)
    return f"mooncake/{MODEL}"


def guidellm(python: Path, url: str, trace: Path, folder: Path) -> Figures:
    scenario, report = folder / "scenario.json", folder / "report.json"
    spec = {
        "backend": {"kind": "openai_http", "target": url, "model": MODEL},
        "tokenizer": {"kind": "huggingface_auto", "model": str(resolve_model(MODEL).path)},
        "profile": {"kind": "replay"},
        "data": [
            {
                "kind": "mooncake",
                "hash_id_block_size": BLOCK_TOKENS,
                "source": {"kind": "json_file", "path": str(trace)},
            }
        ],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    scenario.write_text(json.dumps({"metadata": {"name": "trace"}, "spec": spec, "benchmarks": [{}]}))
    run([str(python.with_name("guidellm")), "run", "--config", str(scenario), "--disable-progress"], {})
    [found] = json.loads(report.read_bytes())["benchmarks"]
    metrics, state = (
        found["metrics"],
        found["scheduler_state"],
    )  # on a busy machine the metrics lack a request now and then
    figures = {
        "requests": state["successful_requests"],
        "errors": state["errored_requests"] + state["cancelled_requests"],
        "requests_in_metrics": metrics["request_totals"]["successful"],
    }
    for name, metric in (("ttft", "time_to_first_token_ms"), ("itl", "inter_token_latency_ms")):
        of = metrics[metric]["successful"]
        figures |= {f"{name}_ms_mean": of["mean"], f"{name}_ms_p50": of["median"]}
        figures[f"{name}_ms_p95"] = of["percentiles"]["p95"]
    return figures


def run(command: list[str], environment: dict[str, str]) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | offline | environment, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{Path(command[0]).name} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )


Tool = Callable[[Path, str, Path, Path], Figures]
TOOLS: dict[str, tuple[Tool, int]] = {"aiperf": (aiperf, 1), "guidellm": (guidellm, 1000)}
"""With the unit of a trace's timestamps, ms."""


def answered(url: str) -> float:
    """Chats that the frontend answered with 200: a tool may lose one in its own books."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        found = re.search(r'frontend_requests_total\{code="200",endpoint="chat"\} ([0-9.e+]+)', page.read().decode())
    return float(found[1]) if found else 0.0


def measure(name: str, source: Path, num_requests: int) -> Figures:
    tool, unit_ms = TOOLS[name]
    packages = PACKAGES / f"{name}.txt"
    python = python_with(packages, TORCH if name == "guidellm" else None)
    with tempfile.TemporaryDirectory(prefix="mooncake-bench-") as folder, Cluster("--engine", "simulated") as cluster:
        trace = scaled_trace(source, Path(folder), num_requests, unit_ms)
        found = tool(python, cluster.url, trace, Path(folder))
        found["answered_200"] = answered(cluster.url)
    emit(measurement=name, packages=packages.read_text().split(), **found)
    if found["answered_200"] < num_requests or found["errors"]:
        text = f"{found['answered_200']} of {num_requests} requests answered, {found['errors']} failed"
        raise SystemExit(f"{name}: {text}")
    return {f"{name}_{figure}": value for figure, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*TOOLS], help="one of the tools")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--trace", type=Path, default=TRACE, help="beside the project unless told otherwise")
    options = parser.parse_args()
    if not options.trace.is_file():
        raise SystemExit(f"no trace at {options.trace}")
    figures: dict[str, Any] = {}
    for name in [options.only] if options.only else TOOLS:
        try:
            figures |= measure(name, options.trace, options.requests)
        except CannotBeHad as error:
            print(f"{name} cannot be had: {error}", file=sys.stderr)
    finish("loadgens", figures)


if __name__ == "__main__":
    main()
