"""Instances change their role as the load does, in a whole cluster: nothing is lost, whatever dies meanwhile."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mooncake.core.messages import ChangeRole
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Role
from mooncake.engine.attempts import TakeRole
from mooncake.prefill.core import LET_GO_NS
from mooncake.scheduler.config import ConductorConfig, RolesConfig
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.frontend import SimRequest
from tests.sim.workload import BLOCK, ENDINGS, FAULTY, check_core, check_run, count_outcomes, run_with_faults

ROLES = RolesConfig(
    ttft_ns=500 * NANOS_PER_MS,
    sample_ns=NANOS_PER_S,
    num_samples=2,
    rest_ns=3 * NANOS_PER_S,
    drain_ns=20 * NANOS_PER_S,
)
CONDUCTOR = ConductorConfig(block_tokens=BLOCK, kv_token_bytes=1024, switch_roles=True, roles=ROLES)
CONFIG = ClusterConfig(prefill=2, decode=3, decode_batch=32, conductor=CONDUCTOR)
HALF_NS = 20 * NANOS_PER_S


class Watched:
    """A run in which the roles that instances took are noted: (time, name, role)."""

    def __init__(self, config: ClusterConfig, *, check: bool) -> None:
        self.switches: list[tuple[int, str, Role]] = []
        self._check = check
        self.cluster = SimCluster(config, 1, self.watch)

    def watch(self, now: int, name: str, core: Any, event: Any, commands: list[Any]) -> None:
        if self._check:
            check_core(now, name, core, event, commands)
        self.switches += [(now, name, command.role) for command in commands if isinstance(command, TakeRole)]

    def run(self, requests: Iterator[SimRequest]) -> SimCluster:
        self.cluster.submit(requests)
        self.cluster.run(300 * NANOS_PER_S)
        self.cluster.settle()
        check_run(self.cluster)
        return self.cluster


def swinging(rng: random.Random, count: int = 600) -> Iterator[SimRequest]:
    """15 requests a second. First long prompts and short answers: work for two and a half prefill instances. Then the
    other way round, for four batches."""
    for at in range(count):
        arrival_ns = 2 * NANOS_PER_S + at * NANOS_PER_S // 15
        heavy = arrival_ns < HALF_NS
        num_tokens, num_output = (4000, 3) if heavy else (60, 1200)
        keys = tuple(rng.randbytes(16) for _ in range(num_tokens // BLOCK))
        yield SimRequest(arrival_ns, num_tokens, num_output, keys, max_tokens=2000)


def mean_ttft_ms(cluster: SimCluster) -> float:
    """Of the requests with long prompts."""
    records = [record for record in cluster.records if record.request.num_tokens == 4000]
    return sum(record.times[0] - record.request.arrival_ns for record in records) / len(records) / NANOS_PER_MS


def test_instances_follow_a_load_that_swings_and_no_request_is_lost() -> None:
    watched = Watched(CONFIG, check=False)
    cluster = watched.run(swinging(random.Random(1)))
    fixed = Watched(msgspec.structs.replace(CONFIG, conductor=ConductorConfig(BLOCK, 1024)), check=False)
    fixed.run(swinging(random.Random(1)))
    assert all(record.completed for record in (*cluster.records, *fixed.cluster.records))
    assert fixed.switches == []
    (first_ns, first, to_prefill), (second_ns, second, to_decode), *_ = watched.switches
    assert to_prefill is Role.PREFILL and first.startswith("decode") and first_ns < 10 * NANOS_PER_S
    assert to_decode is Role.DECODE and second_ns > HALF_NS
    worked = {record.prefill for record in cluster.records}
    assert first in worked, "it prefills in its new role"
    last = {record.decode for record in cluster.records if record.request.arrival_ns > second_ns}
    assert second in last
    ttft = mean_ttft_ms(fixed.cluster), mean_ttft_ms(cluster)
    print(f"mean TTFT with fixed roles {ttft[0]:.0f} ms, with switched ones {ttft[1]:.0f} ms")
    assert ttft[1] < 0.5 * ttft[0]


@pytest.mark.parametrize("moment", ["told", "drained", "taken"])
@pytest.mark.parametrize("victim", ["it", "conductor", "cut", "node-1"])
def test_a_death_in_the_midst_of_a_change_loses_nothing(moment: str, victim: str) -> None:
    """Of each change: told, by the Conductor; drained, when its last request has ended; taken, when it is in its new role."""
    watched = Watched(CONFIG, check=False)
    cluster, struck = watched.cluster, []

    def strike(name: str) -> None:
        if victim == "cut":
            cluster.cut(name, "conductor", 2 * NANOS_PER_S)
            return
        who = name if victim == "it" else victim
        if cluster.alive(who):
            cluster.kill(who)
            cluster.loop.after(NANOS_PER_S, cluster.start, who)

    def watch(now: int, name: str, core: Any, event: Any, commands: list[Any]) -> None:
        watched.watch(now, name, core, event, commands)
        told = isinstance(getattr(event, "message", None), ChangeRole)
        drained = any(isinstance(command, TakeRole) for command in commands)
        if told if moment == "told" else drained:
            struck.append(name)
            cluster.loop.after(NANOS_PER_MS if moment == "taken" else 0, strike, name)

    cluster._watch = watch
    watched.run(swinging(random.Random(1), 270))
    assert struck and all(record.completed for record in cluster.records)


def test_a_prefill_instance_that_holds_hand_overs_becomes_the_decode_instance_they_wait_for() -> None:
    """Many do: the batch is small, and its instance is gone for good."""
    watched = Watched(msgspec.structs.replace(CONFIG, prefill=2, decode=1, decode_batch=2), check=True)
    cluster = watched.cluster
    cluster.loop.at(3 * NANOS_PER_S, cluster.kill, "decode-0")
    rng = random.Random(1)
    arrivals = [2 * NANOS_PER_S + at * NANOS_PER_S // 10 for at in range(100)]
    keys = iter(lambda: rng.randbytes(16), b"")
    watched.run(SimRequest(at, 200, 60, tuple(itertools.islice(keys, 3)), max_tokens=100) for at in arrivals)
    [(changed_ns, _, role)] = watched.switches
    told_ns = changed_ns - LET_GO_NS
    assert role is Role.DECODE and 4 * NANOS_PER_S <= told_ns < 5 * NANOS_PER_S
    assert all(record.completed for record in cluster.records)


RESTLESS = RolesConfig(
    pressure_high=0.001,
    pressure_spare=1e9,
    sample_ns=NANOS_PER_S // 10,
    num_samples=1,
    num_samples_max=1,
    rest_ns=NANOS_PER_S // 10,
    drain_ns=NANOS_PER_S,
)
"""Whoever has anything to do gets one more."""


def restless(config: ClusterConfig) -> ClusterConfig:
    conductor = msgspec.structs.replace(CONDUCTOR, roles=RESTLESS)
    return msgspec.structs.replace(config, prefill=2, decode=3, conductor=conductor)


def test_changes_all_the_time_under_faults_of_all_kinds() -> None:
    outcomes: Counter[str] = Counter()
    switches: Counter[Role] = Counter()

    def watch(now: int, name: str, core: Any, event: Any, commands: list[Any]) -> None:
        check_core(now, name, core, event, commands)
        switches.update(command.role for command in commands if isinstance(command, TakeRole))

    for seed in range(12):
        outcomes += count_outcomes(
            run_with_faults(restless(FAULTY), seed, 120, 4 * NANOS_PER_S, watch=watch, num_choices=(1, 1, 3))
        )
    print(dict(outcomes), dict(switches))
    assert min(switches[Role.PREFILL], switches[Role.DECODE]) > 20
    assert sum(outcomes[ending] for ending in ENDINGS) >= 1430, outcomes
