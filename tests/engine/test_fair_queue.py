"""Whose turn it is, to the last one."""

from __future__ import annotations

import random
from collections import Counter

from mooncake.engine import fair_queue
from mooncake.engine.fair_queue import FairQueue


class Line:
    """A queue whose entries are named by their tenant; each is served before the next is popped, or `at_once` after it."""

    def __init__(self, at_once: int = 1) -> None:
        self.queue = FairQueue()
        self.names: dict[int, str] = {}
        self.serving: list[int] = []
        self._at_once = at_once
        self._seq = 0

    def push(self, name: str, tokens: int = 100, *, weight: float = 1.0, priority: int = 0) -> int:
        self._seq += 1
        self.names[self._seq] = name
        self.queue.push(self._seq, name.rstrip("0123456789"), weight, priority, tokens)
        return self._seq

    def pop(self) -> str:
        if len(self.serving) == self._at_once:
            self.queue.served(self.serving.pop(0))
        seq, _ = self.queue.pop()
        self.serving.append(seq)
        self.queue.check_integrity()
        return self.names[seq]

    def pop_all(self) -> str:
        return " ".join(self.pop() for _ in range(len(self.queue)))


def test_one_tenant_has_priorities_then_arrival() -> None:
    line = Line()
    for name, priority in (("a1", 0), ("a2", 1), ("a3", 0), ("a4", 1), ("a5", -1)):
        line.push(name, priority=priority)
    assert line.pop_all() == "a2 a4 a1 a3 a5"


def test_a_flood_does_not_delay_another_tenant() -> None:
    line = Line()
    for at in range(6):
        line.push(f"a{at}")
    assert [line.pop(), line.pop()] == ["a0", "a1"]
    line.push("b0")
    line.push("b1")
    assert line.pop_all() == "b0 a2 b1 a3 a4 a5"


def test_work_counts_and_not_the_number_of_requests() -> None:
    line = Line()
    for at in range(2):
        line.push(f"a{at}", 400)
    for at in range(6):
        line.push(f"b{at}", 100)
    assert line.pop_all() == "a0 b0 b1 b2 b3 a1 b4 b5"


def test_weights_are_shares() -> None:
    line = Line()
    for at in range(300):
        line.push(f"a{at}", weight=3.0)
        line.push(f"b{at}", weight=1.0)
    got = Counter(line.pop()[0] for _ in range(200))
    assert got == {"a": 150, "b": 50}


def test_nobody_saves_up_turns() -> None:
    """b was away while a had a thousand requests: they share from now on, and a waits for none of the past."""
    line = Line()
    for at in range(1000):
        line.push(f"a{at}")
    for _ in range(990):
        line.pop()
    for at in range(10):
        line.push(f"b{at}")
    assert [name[0] for name in line.pop_all().split()] == list("ba" * 10)


def test_inside_a_tenant_priority_decides_and_between_tenants_it_does_not() -> None:
    line = Line()
    for name, priority in (("a1", 9), ("a2", 9), ("b1", 0), ("b2", 5), ("a3", 10)):
        line.push(name, priority=priority)
    assert line.pop_all() == "b2 a3 a1 b1 a2"


def test_turns_let_a_newcomer_pass_what_was_popped_and_is_not_done() -> None:
    line = Line(at_once=8)
    turns = {}
    for at in range(4):
        line.push(f"a{at}")
        seq, turns[f"a{at}"] = line.queue.pop()
    seq = line.push("b")
    assert line.queue.pop()[0] == seq
    line.queue.give_back(seq)
    line.queue.served(1)
    seq, turns["b"] = line.queue.pop()
    order = sorted(turns, key=lambda name: (turns[name], name))
    assert order == ["a0", "a1", "b", "a2", "a3"]


def test_a_higher_priority_takes_the_turn_of_its_own_tenants_lower_ones() -> None:
    queue = FairQueue()
    turns = []
    for seq, (tenant, priority) in enumerate((("a", 0), ("b", 0), ("a", 0), ("a", 7), ("b", 0))):
        queue.push(seq, tenant, 1.0, priority, 100)
        turns.append(queue.pop()[1])
    assert turns[3] == turns[0] < turns[2]
    assert turns[1] < turns[4]


def test_what_is_given_back_waits_as_before() -> None:
    line = Line()
    for name in ("a1", "b1", "a2", "b2"):
        line.push(name)
    for _ in range(5):
        seq, turn = line.queue.pop()
        assert (line.names[seq], turn) == ("a1", 0)
        line.queue.give_back(seq)
        line.queue.check_integrity()
    assert line.pop_all() == "a1 b1 a2 b2"


def test_who_leaves_the_line_is_not_missed() -> None:
    line = Line()
    seqs = [line.push(name) for name in ("a1", "a2", "b1")]
    line.queue.remove(seqs[0])
    assert line.pop_all() == "a2 b1"
    line.queue.served(seqs[1])
    line.queue.served(seqs[1])
    line.queue.served(seqs[2])
    line.queue.check_integrity()
    assert len(line.queue) == 0 and line.queue.head() is None


def test_turns_never_go_back() -> None:
    """An engine still has sequences with older turns when the line has been empty."""
    queue = FairQueue()
    last = -1
    for seq in range(100):
        queue.push(seq, "a" if seq % 3 else "b", 1.0, 0, 1 + seq % 7)
        _, turn = queue.pop()
        queue.served(seq)
        assert turn >= last
        last = turn
    assert last > 0


def test_shares_hold_for_any_mix() -> None:
    """While both always wait, neither has had more than its share by more than its largest request and one of the other."""
    for seed in range(30):
        rng = random.Random(seed)
        weights = {"a": rng.uniform(0.2, 5), "b": rng.uniform(0.2, 5)}
        queue, sizes, used = FairQueue(), {}, {"a": 0.0, "b": 0.0}
        seq = 0
        for tenant in "ab" * 3:
            seq += 1
            sizes[seq] = (tenant, rng.randrange(1, 1000))
            queue.push(seq, tenant, weights[tenant], 0, sizes[seq][1])
        for _ in range(400):
            popped, _ = queue.pop()
            tenant, size = sizes[popped]
            used[tenant] += size / weights[tenant]
            queue.served(popped)
            seq += 1
            sizes[seq] = (tenant, rng.randrange(1, 1000))
            queue.push(seq, tenant, weights[tenant], 0, sizes[seq][1])
            assert abs(used["a"] - used["b"]) <= 1000 / weights["a"] + 1000 / weights["b"], seed


def test_memory_is_bounded() -> None:
    queue = FairQueue()
    queue.push(-1, "long", 1.0, 0, 1)
    queue.pop()  # as long as it is served, all others owe what they had
    for seq in range(3 * fair_queue.NUM_TENANTS_MAX):
        queue.push(seq, f"t{seq}", 1.0, 0, 100)
        queue.pop()
        queue.served(seq)
    assert len(queue._tenants) <= fair_queue.NUM_TENANTS_MAX
