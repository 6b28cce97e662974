"""What goes wrong, and when: a schedule drawn from a seed before the run, so that it can be printed, cut down and replayed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import msgspec

from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.sim.cluster import SimCluster


class Kill(msgspec.Struct, frozen=True, tag=True):
    """The process dies at `at` and is started again after down_ns."""

    at: int
    name: str
    down_ns: int


class Cut(msgspec.Struct, frozen=True, tag=True):
    """Nothing passes between two processes for a while."""

    at: int
    one: str
    other: str
    duration_ns: int


class Reset(msgspec.Struct, frozen=True, tag=True):
    """The stream between two processes breaks and is made anew."""

    at: int
    one: str
    other: str


class Slow(msgspec.Struct, frozen=True, tag=True):
    """An instance computes at a share of its speed for a while."""

    at: int
    name: str
    speed: float
    duration_ns: int


Fault = Kill | Cut | Reset | Slow


class FaultRates(msgspec.Struct, frozen=True):
    """How many of each kind in a run, and how long they last at most."""

    kills: int = 6
    cuts: int = 2
    resets: int = 4
    slows: int = 2
    down_ns: int = 2 * NANOS_PER_S
    cut_ns: int = 6 * NANOS_PER_S
    slow_ns: int = 4 * NANOS_PER_S


def draw_faults(rng: random.Random, names: Sequence[str], span_ns: int, rates: FaultRates) -> list[Fault]:
    """Faults of all kinds, in order of time, among the processes of these names."""
    faults: list[Fault] = [
        Kill(rng.randrange(span_ns), rng.choice(names), rng.randrange(50 * NANOS_PER_MS, rates.down_ns))
        for _ in range(rates.kills)
    ]
    for _ in range(rates.cuts):
        one, other = rng.sample(names, 2)
        faults.append(Cut(rng.randrange(span_ns), one, other, rng.randrange(50 * NANOS_PER_MS, rates.cut_ns)))
    for _ in range(rates.resets):
        one, other = rng.sample(names, 2)
        faults.append(Reset(rng.randrange(span_ns), one, other))
    for _ in range(rates.slows):
        speed = rng.uniform(0.05, 0.8)
        faults.append(Slow(rng.randrange(span_ns), rng.choice(names), speed, rng.randrange(rates.slow_ns)))
    return sorted(faults, key=lambda fault: fault.at)


def schedule(cluster: SimCluster, faults: Iterable[Fault]) -> None:
    for fault in faults:
        cluster.loop.at(fault.at, _strike, cluster, fault)


def _strike(cluster: SimCluster, fault: Fault) -> None:
    match fault:
        case Kill() if cluster.alive(fault.name):
            cluster.kill(fault.name)
            cluster.loop.after(fault.down_ns, cluster.start, fault.name)
        case Cut():
            cluster.cut(fault.one, fault.other, fault.duration_ns)
        case Reset():
            cluster.reset(fault.one, fault.other)
        case Slow():
            cluster.slow(fault.name, fault.speed, fault.duration_ns)
