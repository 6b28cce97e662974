"""What happens beyond capacity: a real cluster with the simulated engine, open-loop arrivals, and every answer looked at.

    python benchmarks/overload.py [--quick] [--admission soft|hard|off] [--factor 3] [--seconds 60]

First the rate rises until goodput does not, which gives its peak; then `factor` times that rate for a minute. What arrives in
the first seconds of each load, while queues are still empty, is not counted. All prompts are of one length: where some are
shorter, more and more of these are accepted in place of long ones as the rate rises, and requests per second have no peak.

slo_of_accepted   of the requests that were not answered 429, those that ended well with TTFT and TBT within their objectives
goodput_vs_peak   such requests per second, by the peak
p99_ms_of_429     from the first byte sent to the whole answer, of those that were refused
peak_goodput_per_s, offered_per_s, refused_share, p99_ttft_ms_of_accepted, errors: beside them
client_late_ms_p99  how late requests were sent, a check that the client kept up
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from collections import Counter
from typing import NamedTuple

from common import MODEL, Cluster, emit, finish, percentile

TTFT_S, TBT_S = 2.0, 0.15
OPTIONS = (
    "--engine", "simulated", "--simulated-hardware", "h100", "--simulated-speed", "0.5",
    "--prefill", "1", "--decode", "1", "--slo-ttft-s", str(TTFT_S), "--slo-tbt-s", str(TBT_S),
)  # fmt: skip
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, (16, 80)
RATE_FIRST, RATE_STEP = 6.0, 1.25
WARM_S = 5.0
SECONDS_MAX = 120.0
"""For one answer."""


class Planned(NamedTuple):
    at_s: float
    body: bytes


class Outcome(NamedTuple):
    """answered_s: of an error, when it was complete. lag_s: how late the client sent it."""

    status: int
    ttft_s: float
    tbt_s: float
    answered_s: float
    lag_s: float

    @property
    def effective(self) -> bool:
        return self.status == 200 and self.ttft_s <= TTFT_S and self.tbt_s <= TBT_S


def plan(rng: random.Random, rate: float, seconds: float) -> list[Planned]:
    """Poisson arrivals of prompts that share nothing."""
    planned: list[Planned] = []
    at = rng.expovariate(rate)
    while at < seconds:
        prompt = [rng.randrange(1000, 5000) for _ in range(PROMPT_TOKENS)]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": rng.randrange(*OUTPUT_TOKENS), "stream": True}
        planned.append(Planned(at, json.dumps(body | {"ignore_eos": True}).encode()))
        at += rng.expovariate(rate)
    return planned


def tbt(times: list[float]) -> float:
    """Mean of the longest tenth of the gaps; 0 without any."""
    gaps = sorted((after - before for before, after in itertools.pairwise(times)), reverse=True)
    longest = gaps[: -(-len(gaps) // 10)]
    return sum(longest) / len(longest) if longest else 0.0


async def ask(port: int, request: Planned, began: float) -> Outcome:
    await asyncio.sleep(began + request.at_s - time.perf_counter())
    sent = time.perf_counter()
    lag = sent - began - request.at_s
    try:
        async with asyncio.timeout(SECONDS_MAX):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return await _converse(reader, writer, request.body, sent, lag)
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return Outcome(0, 0.0, 0.0, time.perf_counter() - sent, lag)


async def _converse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, sent: float, lag: float
) -> Outcome:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    status = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
    if status != 200:
        await reader.read()
        return Outcome(status, 0.0, 0.0, time.perf_counter() - sent, lag)
    times: list[float] = []
    ended = False
    while (size := int(await reader.readline(), 16)) > 0:
        chunk = await reader.readexactly(size + 2)
        times += [time.perf_counter()] * chunk.count(b'"text":"')
        ended |= b"[DONE]" in chunk and b'data: {"error"' not in chunk
    return Outcome(200 if ended else 0, times[0] - sent, tbt(times), 0.0, lag)


async def run_load(port: int, rng: random.Random, rate: float, seconds: float) -> list[Outcome]:
    """Of what arrived in these seconds, after the first ones."""
    planned = plan(rng, rate, WARM_S + seconds)
    began = time.perf_counter() + 0.2
    found = await asyncio.gather(*(ask(port, request, began) for request in planned))
    return [outcome for request, outcome in zip(planned, found, strict=True) if request.at_s >= WARM_S]


def report(rate: float, seconds: float, found: list[Outcome]) -> dict[str, float]:
    accepted = [each for each in found if each.status != 429]
    refused = [each.answered_s for each in found if each.status == 429]
    effective = sum(each.effective for each in accepted)
    shown = {
        "offered_per_s": len(found) / seconds,
        "goodput_per_s": effective / seconds,
        "slo_of_accepted": effective / max(1, len(accepted)),
        "refused_share": len(refused) / max(1, len(found)),
        "p99_ms_of_429": 1e3 * percentile(refused, 0.99) if refused else 0.0,
        "p50_ms_of_429": 1e3 * percentile(refused, 0.50) if refused else 0.0,
        "p99_ttft_ms_of_accepted": 1e3 * percentile([each.ttft_s for each in accepted] or [0.0], 0.99),
        "p99_tbt_ms_of_accepted": 1e3 * percentile([each.tbt_s for each in accepted] or [0.0], 0.99),
        "client_late_ms_p99": 1e3 * percentile([each.lag_s for each in found], 0.99),
        "errors": sum(each.status not in (200, 429) for each in found),
    }
    statuses = Counter(str(each.status) for each in found)
    emit(measurement="load", rate=round(rate, 2), seconds=seconds, statuses=dict(statuses),
         **{name: round(value, 3) for name, value in shown.items()})  # fmt: skip
    return shown


def find_peak(port: int, rng: random.Random, seconds: float) -> float:
    """The highest goodput at rising rates; it is over when two steps in a row brought no more."""
    peak, rate, num_worse = 0.0, RATE_FIRST, 0
    while num_worse < 2:
        goodput = report(rate, seconds, asyncio.run(run_load(port, rng, rate, seconds)))["goodput_per_s"]
        num_worse = num_worse + 1 if goodput <= 1.02 * peak else 0
        peak = max(peak, goodput)
        rate *= RATE_STEP
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter steps, and 20 s of overload")
    parser.add_argument("--admission", default="soft", choices=("off", "soft", "hard"))
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of overload; 60")
    parser.add_argument("--peak", type=float, default=0.0, help="requests per second; measured if not given")
    arguments = parser.parse_args()
    rng = random.Random(0)
    seconds = arguments.seconds or (20.0 if arguments.quick else 60.0)
    with Cluster(*OPTIONS, "--admission", arguments.admission) as cluster:
        asyncio.run(run_load(cluster.port, rng, RATE_FIRST, 10.0))  # predictions are calibrated by what came
        peak = arguments.peak or find_peak(cluster.port, rng, 10.0 if arguments.quick else 20.0)
        before = cluster.cpu()
        rate = arguments.factor * peak
        shown = report(rate, seconds, asyncio.run(run_load(cluster.port, rng, rate, seconds)))
        used = sum(after.engine + after.rest - sum(before[name]) for name, after in cluster.cpu().items())
    emit(measurement="cores_used_by_cluster", value=round(used / seconds, 3))
    names = ("slo_of_accepted", "p99_ms_of_429", "refused_share", "offered_per_s", "p99_ttft_ms_of_accepted",
             "client_late_ms_p99", "errors")  # fmt: skip
    figures = {name: shown[name] for name in names}
    finish("overload", figures | {"peak_goodput_per_s": peak, "goodput_vs_peak": shown["goodput_per_s"] / peak})


if __name__ == "__main__":
    main()
