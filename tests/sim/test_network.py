"""Virtual time, streams and links by themselves."""

from __future__ import annotations

import random
from typing import Any

from mooncake.core.messages import Drain
from mooncake.sim.links import Link, transfer
from mooncake.sim.loop import CoreRunner, Loop
from mooncake.sim.network import Network, NetworkConfig

QUIET = NetworkConfig(latency_ns=10, jitter_ns=0, death_notice_ns=5, cut_notice_ns=100, redial_ns=50)


class Peer:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.log: list[tuple[int, str]] = []

    def opened(self, peer: str) -> None:
        self.log.append((self.loop.now, f"+{peer}"))

    def gone(self, peer: str) -> None:
        self.log.append((self.loop.now, f"-{peer}"))

    def received(self, sender: str, messages: list[Any]) -> None:
        self.log += [(self.loop.now, message.name) for message in messages]


def pair(config: NetworkConfig = QUIET) -> tuple[Loop, Network, Peer, Peer]:
    loop = Loop()
    network = Network(loop, config, random.Random(1))
    one, other = Peer(loop), Peer(loop)
    network.start("a", one)
    network.start("b", other)
    network.dial("a", "b")
    return loop, network, one, other


def test_calls_run_in_order_of_time_then_of_asking() -> None:
    loop, log = Loop(), []
    for time, name in ((5, "c"), (3, "a"), (5, "d"), (3, "b")):
        loop.at(time, lambda name=name: log.append((loop.now, name)))
    loop.run(4)
    assert (log, loop.now) == ([(3, "a"), (3, "b")], 4)
    loop.run(9)
    assert log[2:] == [(5, "c"), (5, "d")]
    assert loop.now == 9


def test_messages_arrive_in_order_over_an_open_stream() -> None:
    loop, network, one, other = pair()
    network.send("a", "b", Drain("too early"))
    loop.run(10)
    network.send("a", "b", Drain("x"))
    network.send("b", "a", Drain("y"))
    loop.run(100)
    assert one.log == [(10, "+b"), (20, "y")]
    assert other.log == [(10, "+a"), (20, "x")]


def test_a_killed_peer_is_noticed_and_dialled_until_it_is_back() -> None:
    loop, network, one, other = pair()
    loop.run(20)
    network.send("b", "a", Drain("on its way"))
    network.kill("b")
    loop.run(24)
    network.send("a", "b", Drain("lost"))
    loop.run(130)
    again = Peer(loop)
    network.start("b", again)
    loop.run(300)
    assert one.log == [(10, "+b"), (25, "-b"), (185, "+b")]
    assert other.log == [(10, "+a")]
    assert again.log == [(185, "+a")]


def test_a_new_life_of_the_dialler_replaces_its_old_stream_unnoticed() -> None:
    loop, network, _, other = pair()
    loop.run(20)
    network.kill("a")
    network.start("a", Peer(loop))
    network.dial("a", "b")
    loop.run(200)
    assert other.log == [(10, "+a"), (30, "+a")]


def test_a_cut_swallows_messages_until_both_ends_notice() -> None:
    loop, network, one, other = pair()
    loop.run(20)
    network.cut("a", "b", 500)
    network.send("a", "b", Drain("lost"))
    loop.run(1000)
    assert one.log == [(10, "+b"), (120, "-b"), (530, "+b")]
    assert other.log == [(10, "+a"), (120, "-a"), (530, "+a")]


def test_lost_and_repeated_shares_are_as_configured() -> None:
    loop, network, _, other = pair(NetworkConfig(latency_ns=10, jitter_ns=0, loss=0.2, repeat=0.1, delay_ns=1000))
    loop.run(10)
    for at in range(2000):
        network.send("a", "b", Drain(str(at)))
    loop.run(5000)
    names = [name for _, name in other.log[1:]]
    assert 1500 < len(set(names)) < 1700
    assert 100 < len(names) - len(set(names)) < 220


def test_links_pass_bytes_in_turn_and_the_slowest_decides() -> None:
    fast, slow = Link("fast", 1e9), Link("slow", 1e8)
    assert transfer([fast], 100, 0) == 100
    assert transfer([fast, slow], 100, 0) == 1000
    assert transfer([fast], 100, 0) == 300
    assert transfer([slow], 100, 5000) == 6000
    assert (slow.num_bytes, slow.busy_ns) == (200, 2000)


class AlarmCore:
    """Wants a tick at each of these times."""

    def __init__(self, *times: int) -> None:
        self.times = list(times)
        self.ticks: list[int] = []

    def handle(self, event: Any, now: int) -> list[Any]:
        if event == "tick":
            self.ticks.append(now)
        self.times = [time for time in self.times if time > now] if event == "tick" else [*self.times, event]
        return []

    def deadline(self) -> int | None:
        return min(self.times, default=None)


def test_a_deadline_that_moves_is_met_once() -> None:
    loop = Loop()
    core = AlarmCore()
    runner = CoreRunner(loop, "core", core, {}, "tick", lambda *event: None)
    for time in (50, 30, 70):
        runner.handle(time)
    loop.run(40)
    core.times = [90]
    loop.run(100)
    assert core.ticks == [30, 90]
