"""Policies: the laws that all of them keep, under any order of leases, and what each of them is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.config import Config
from mooncake.store.events import Commit, Reserve
from mooncake.store.eviction import DEFAULT_POLICY, POLICIES, EvictionPolicy, Fifo, Learned, S3Fifo
from mooncake.store.eviction.ghosts import Ghosts
from mooncake.store.eviction.reuse_model import ReuseModel
from tests.store.helpers import UNIT, Driver, Told, keys, ten_objects

SIZES = (1, 1, 2, 3)
"""Of an object by the number of its row."""
PREFIX_AWARE = ("lru", "learned")


class Store:
    """Leases of chains, as `Objects` keeps them: a chain is named by its letters, an object by those up to its own. Checks the
    laws whenever objects are taken."""

    def __init__(self, policy: EvictionPolicy, *, prefix_aware: bool) -> None:
        self.policy = policy
        self.prefix_aware = prefix_aware
        self.rows: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.refs: dict[int, int] = {}
        self.prefixes: dict[str, int | None] = {}
        """The row of the one before it, by name, until that is removed."""
        self.sizes: list[int] = []
        self.free: list[int] = []

    def lease(self, chain: str) -> list[int]:
        """What is not there is made."""
        names = [chain[: end + 1] for end in range(len(chain))]
        there = [self.rows[name] for name in names if name in self.rows]
        woken = [row for row in there if not self.refs[row]]
        self.policy.hold(woken)
        for row in there:
            self.refs[row] += 1
        made = [self._make(name) for name in names if name not in self.rows]
        parents = [self.rows.get(self.names[row][:-1]) for row in made]
        if made:
            self.policy.add(made, [self.names[row].encode() for row in made], self.sizes, parents)
        self.check()
        return [self.rows[name] for name in names]

    def _make(self, name: str) -> int:
        if not self.free:
            self.free.append(len(self.sizes))
            self.sizes.append(SIZES[len(self.sizes) % len(SIZES)])
        row = self.free.pop()
        self.rows[name], self.names[row], self.refs[row] = row, name, 1
        self.prefixes[name] = self.rows.get(name[:-1])
        return row

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.refs[row] -= 1
        self.policy.idle([row for row in rows if not self.refs[row]])
        self.check()

    def remove(self, row: int) -> None:
        """Whoever leases it keeps it, but the policy hears no more of it: as with one that is condemned."""
        if not self.refs[row]:
            self.policy.hold([row])
        self.policy.discard([row])
        self._forget(row)
        self.check()

    def take(self, num_bytes: int) -> list[str]:
        candidates = {row for row, count in self.refs.items() if not count}
        rows = self.policy.take(num_bytes, self.sizes)
        sizes = [self.sizes[row] for row in rows]
        assert len(set(rows)) == len(rows) and candidates.issuperset(rows)
        assert sum(sizes[:-1]) < num_bytes or not rows
        assert sum(sizes) >= num_bytes or len(rows) == len(candidates)
        taken = [self.names[row] for row in rows]
        if self.prefix_aware:
            idle = {self.names[row] for row in candidates}
            for at, name in enumerate(taken):
                suffixes = [other for other in idle - set(taken[:at]) if self.prefixes[other] == self.rows[name]]
                assert not suffixes, f"{name} goes before {suffixes}"
        for row in rows:
            self._forget(row)
        self.check()
        return taken

    def _forget(self, row: int) -> None:
        self.prefixes = {name: None if before == row else before for name, before in self.prefixes.items()}
        name = self.names.pop(row)
        del self.rows[name], self.refs[row], self.prefixes[name]
        self.free.append(row)

    def check(self) -> None:
        assert len(self.policy) == sum(not count for count in self.refs.values())


CHAINS = st.text("ab", min_size=1, max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("lease"), CHAINS),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("take"), st.integers(1, 8)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", POLICIES)
@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_laws(name: str, steps: list[tuple[str, str | int]]) -> None:
    """Leases are of whole chains, prefix first, and any number of them overlap. Removing cuts a chain: what is behind is worth
    nothing, and hangs off nothing."""
    store = Store(POLICIES[name](), prefix_aware=name in PREFIX_AWARE)
    leases: list[list[int]] = []
    for kind, value in steps:
        if isinstance(value, str):
            leases.append(store.lease(value))
        elif kind == "release" and leases:
            store.release(leases.pop(value % len(leases)))
        elif kind == "take":
            store.take(value)
        elif kind == "remove":
            idle = [row for row, count in store.refs.items() if not count]
            if idle:
                store.remove(idle[value % len(idle)])
    for lease in leases:
        store.release(lease)
    store.take(1000)
    assert len(store.policy) == 0 and not store.refs


@pytest.mark.parametrize("name", POLICIES)
@given(steps=st.lists(st.tuples(st.sampled_from("hidt"), st.lists(st.integers(0, 9), max_size=6)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_leases_of_any_rows_in_any_order(name: str, steps: list[tuple[str, list[int]]]) -> None:
    """Whoever stores what is no chain may lease and release as it likes: nothing is lost, nothing that is leased goes."""
    policy, sizes = POLICIES[name](), [1] * 10
    state = ["gone"] * 10  # or leased, or idle
    for kind, numbers in steps:
        wanted = list(dict.fromkeys(numbers))
        before = {"h": "idle", "i": "leased", "d": "leased", "t": ""}[kind]
        rows = [row for row in wanted if state[row] == before]
        if kind == "h":
            new = [row for row in wanted if state[row] == "gone"]
            policy.hold(rows)
            policy.add(new, [bytes([row]) for row in new], sizes, [row - 1 if row else None for row in new])
            rows += new
        elif kind == "i":
            policy.idle(rows)
        elif kind == "d":
            policy.discard(rows)
        else:
            rows = policy.take(len(numbers), sizes)
            assert all(state[row] == "idle" for row in rows)
            assert len(rows) == min(len(numbers), state.count("idle"))
        for row in rows:
            state[row] = {"h": "leased", "i": "idle", "d": "gone", "t": "gone"}[kind]
        assert len(policy) == state.count("idle")


def test_a_store_tells_what_is_before_an_object() -> None:
    """Reserve names a chain from its beginning; what is committed, in pieces and in the end, knows its place."""
    policy = Told()
    drive = Driver(ten_objects(policy=policy))

    def reserve(*names: int) -> list[int]:
        puts = drive(Reserve(1, 0, keys(*names), (UNIT,) * len(names), lease_existing=True))
        return [put.location.generation for put in puts]

    numbers = reserve(1, 2, 3, 4)
    drive(Commit(1, 0, (numbers[0], numbers[1]), lease=True))
    drive(Commit(1, 0, (numbers[3],), lease=True))  # what is before it is not there yet
    drive(Commit(1, 0, (numbers[2],), lease=True))
    other = reserve(1, 2, 5)
    drive(Commit(1, 0, (other[2],)))
    one, two, three, four, five = keys(1, 2, 3, 4, 5)
    assert policy.parents == {one: None, two: one, three: two, four: None, five: two}


def test_the_configuration_names_all_policies() -> None:
    hint = get_type_hints(Config)["eviction"]
    assert get_args(hint) == tuple(POLICIES) and Config().eviction == DEFAULT_POLICY


def test_fifo_does_not_mind_uses() -> None:
    store = Store(Fifo(), prefix_aware=False)
    for chain in ("a", "b", "a", "c"):
        store.release(store.lease(chain))
    held = store.lease("b")
    assert store.take(1) == ["a"] and store.take(9) == ["c"]
    store.release(held)
    late = store.lease("d")
    store.release(late)
    assert store.take(1) == ["b"]


def test_s3fifo_keeps_what_is_used_and_remembers_what_went() -> None:
    store = Store(S3Fifo(), prefix_aware=False)
    store.sizes, store.free = [1] * 100, list(range(99, -1, -1))
    for chain in ("a", "a", "a", "b", "b", "c", "d", "e"):
        store.release(store.lease(chain))
    assert store.take(2) == ["b", "c"]  # one use more is too little; a went on to the main queue
    store.release(store.lease("c"))  # it comes to the main queue at once
    assert store.take(2) == ["d", "e"] and store.take(2) == ["a", "c"]


def used_often(policy: Learned) -> Store:
    """A store that has seen many objects once, and few often."""
    store = Store(policy, prefix_aware=True)
    for number in range(3000):
        for chain in ("a" * 8, "b" * 8, f"{number}"[-4:].rjust(5, "c")):
            store.release(store.lease(chain))
        while sum(store.sizes[row] for row in store.refs) > 80:
            store.take(10)
    return store


def test_learned_keeps_what_is_used_often_through_a_scan() -> None:
    store = used_often(Learned())
    for number in range(100):
        store.release(store.lease(f"scan{number}"))
        while sum(store.sizes[row] for row in store.refs) > 80:
            store.take(10)
    assert {"a" * 8, "b" * 8} <= store.rows.keys()


def test_learned_lets_go_of_one_leased_without_its_prefix() -> None:
    """Keys that were stored together and are no chain do not keep each other."""
    policy, sizes = Learned(), [1] * 4
    policy.add(range(4), [bytes([row]) for row in range(4)], sizes, [None, 0, 1, 2])
    policy.idle(range(4))
    policy.hold([3])
    policy.idle([3])
    assert policy.take(3, sizes) == [2, 1, 0]


def test_what_learned_keeps_of_old_uses_is_bounded() -> None:
    policy, sizes = Learned(), [1] * 21
    policy.add([20], [b"x"], sizes, [None])
    policy.idle([20])  # never used again, so the others stand behind it
    policy.add(range(20), [bytes([row]) for row in range(20)], sizes, [None, *range(19)])
    policy.idle(range(20))
    for _ in range(2000):
        policy.hold(range(20))
        policy.idle(range(20))
    assert sum(map(len, policy._queues)) < 200


def test_ghosts_remember_at_least_as_many_as_wanted_and_at_most_twice() -> None:
    ghosts: Ghosts[int] = Ghosts()
    for number in range(1000):
        ghosts.remember(b"%d" % number, number, 50)
        assert min(number + 1, 50) <= len(ghosts) <= 100
    assert ghosts.recall(b"999") == 999 and ghosts.recall(b"999") is None and ghosts.recall(b"3") is None
    assert all(ghosts.recall(b"%d" % number) == number for number in range(950, 999))


def learned_model(rounds: int) -> tuple[ReuseModel, int]:
    """Of each round's hundred objects with trait 0 none is used, of those with trait 1 half are, a thousand later."""
    model, now = ReuseModel(2, 1), 0
    for number in range(rounds):
        for kind in (0, 1):
            model.born(kind, 100)
        if number >= 5:
            model.used(1, 1000, 50)
        now += 200
        model.refit(now, 1000)
    return model, now


def test_the_model_tells_classes_apart_and_sees_an_answer_coming() -> None:
    model, _ = learned_model(200)
    assert model.density(1, 0) > 5 * model.density(0, 0)
    due, early, late = (model.density(1, age) for age in (900, 0, 4000))
    assert due > 2 * early and early > 10 * late
    assert early == pytest.approx(0.5 / 1000, rel=0.3)  # half of them, for a thousand


def test_the_model_does_not_take_young_objects_for_unused_ones() -> None:
    """Nothing is known of ages that nobody has reached, so they count as before anything was seen: never as barren."""
    model = ReuseModel(1, 1)
    model.born(0, 10_000)
    model.refit(600, 1000)
    fresh = ReuseModel(1, 1)
    fresh.refit(600, 1000)
    assert model.density(0, 500) == pytest.approx(fresh.density(0, 500), rel=0.2)
