import random

import pytest

from mooncake.scheduler.prefix_index import (
    ANY,
    EXPECTED,
    FAST,
    IN_FAST,
    IN_SLOW,
    SWEEP_BLOCKS,
    PrefixIndex,
    reach_bits,
)
from tests.scheduler.cluster import blocks


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(100)


def test_one_walk_gives_every_holders_length(index: PrefixIndex) -> None:
    a, b, c = (index.add_holder() for _ in range(3))
    index.add(a, IN_FAST, blocks(1, 2, 3))
    index.add(b, IN_FAST, blocks(1, 3))
    index.add(c, IN_FAST, blocks(2, 3))
    lengths = index.match(blocks(1, 2, 3, 4)).lengths
    assert lengths[FAST].tolist() == [0, 3, 1, 0]
    assert index.match(()).lengths.tolist() == [[0, 0, 0, 0]] * 3
    index.check_integrity()


def test_levels_are_nested(index: PrefixIndex) -> None:
    node = index.add_holder()
    index.add(node, IN_FAST, blocks(1))
    index.add(node, IN_SLOW, blocks(1, 2))
    index.predict(node, blocks(1, 2, 3), 10)
    assert index.match(blocks(1, 2, 3)).lengths[:, node].tolist() == [1, 2, 3]
    index.discard(node, IN_FAST, blocks(1))
    assert index.match(blocks(1, 2, 3)).lengths[:, node].tolist() == [0, 2, 3]
    index.check_integrity()


def test_predictions_expire_unless_confirmed_or_renewed(index: PrefixIndex) -> None:
    slot = index.add_holder()
    index.predict(slot, blocks(1, 2, 3), 10)
    index.add(slot, IN_FAST, blocks(1))
    index.predict(slot, blocks(2), 20)
    assert index.expiries[0][0] == 10
    index.expire(10)
    assert index.match(blocks(1, 2, 3)).lengths[:, slot].tolist() == [1, 1, 2]
    index.expire(20)
    assert index.match(blocks(1, 2, 3)).lengths[:, slot].tolist() == [1, 1, 1]
    assert not index.expiries and len(index) == 1
    index.check_integrity()


def test_full_index_drops_oldest_predictions_then_refuses() -> None:
    index = PrefixIndex(4)
    slot = index.add_holder()
    index.predict(slot, blocks(1, 2), 10)
    index.predict(slot, blocks(3), 20)
    index.add(slot, IN_FAST, blocks(4, 5))
    assert index.match(blocks(3)).lengths[EXPECTED, slot] == 1
    assert index.match(blocks(1)).lengths[EXPECTED, slot] == 0
    index.add(slot, IN_FAST, blocks(6, 7, 8))
    assert len(index) == 4 and index.num_refused == 1
    index.predict(slot, blocks(9, 10), 30)
    assert index.num_refused == 2
    index.check_integrity()


def test_removed_holder_matches_nothing_and_its_slot_waits_for_the_sweep(index: PrefixIndex) -> None:
    old, other = index.add_holder(), index.add_holder()
    index.add(old, IN_FAST, blocks(1, 2, 3))
    index.predict(old, blocks(4), 10)
    index.add(other, IN_FAST, blocks(1))
    index.remove_holder(old)
    assert index.match(blocks(1, 2)).lengths[ANY].tolist() == [0, 0, 1]
    index.sweep(2)
    new = index.add_holder()
    assert (bool(index.sweeps), new in (old, other)) == (True, False)
    index.sweep(100)
    assert (index.sweeps, len(index)) == ([], 1)
    assert index.add_holder() == old
    assert index.match(blocks(1)).lengths[:, old].tolist() == [0, 0, 0]
    index.expire(10)
    index.check_integrity()


def test_hidden_holder_keeps_its_entries(index: PrefixIndex) -> None:
    slot = index.add_holder()
    index.add(slot, IN_FAST, blocks(1))
    index.hide(slot)
    assert index.match(blocks(1)).lengths[ANY, slot] == 0
    index.show(slot)
    assert index.match(blocks(1)).lengths[ANY, slot] == 1


def test_the_slow_copy_stays_when_the_fast_one_goes(index: PrefixIndex) -> None:
    node = index.add_holder()
    index.add(node, IN_SLOW, blocks(1, 2))
    index.add(node, IN_FAST, blocks(1))
    index.discard(node, IN_SLOW, blocks(1))
    assert index.match(blocks(1, 2)).lengths[:, node].tolist() == [1, 2, 2] and index.num_slow == 1
    index.discard(node, IN_FAST, blocks(1, 2))  # it has 2 in its slow tier only
    assert index.match(blocks(2)).lengths[:, node].tolist() == [0, 1, 1]
    index.discard(node, IN_SLOW, blocks(1, 2))
    assert len(index) == 0 and index.num_held(node) == 0
    index.check_integrity()


def test_the_later_of_two_predictions_decides(index: PrefixIndex) -> None:
    slot = index.add_holder()
    index.predict(slot, blocks(1, 2), 20)
    index.predict(slot, blocks(2), 10)
    index.expire(10)
    assert index.match(blocks(1, 2)).lengths[EXPECTED, slot] == 1
    index.check_integrity()


def test_a_snapshot_is_true_at_once_for_what_it_names_and_after_the_sweeps_for_the_rest() -> None:
    index = PrefixIndex(100_000)
    node, other = index.add_holder(), index.add_holder()
    many = blocks(*range(SWEEP_BLOCKS + 500))
    index.add(other, IN_FAST, many)
    index.add(node, IN_FAST, many[:1000])  # the sweep begins with the last keys
    index.add(node, IN_SLOW, many[:10])
    index.replace(node, IN_FAST, many[5:20] + blocks(10**6))
    assert index.sweeps and index.num_held(node) > 26
    assert index.match(blocks(10**6)).lengths[FAST, node] == 1
    index.add(node, IN_FAST, many[30:31])  # reported since
    index.replace(node, IN_FAST, many[5:20] + many[30:31])  # and another snapshot
    while index.sweeps:
        index.sweep(300)
    assert [bool(index.match([key]).lengths[FAST, node]) for key in many[:40]] == [
        5 <= at < 20 or at == 30 for at in range(40)
    ]
    assert index.match(many).lengths[ANY, node] == 20, "the other tier is not touched"
    assert index.num_held(node) == 10 + 10 + 1 and index.num_held(other) == len(many)
    index.check_integrity()


def test_what_comes_between_a_snapshot_and_its_sweep_stays() -> None:
    index = PrefixIndex(100_000)
    node = index.add_holder()
    many = blocks(*range(SWEEP_BLOCKS + 500))
    index.add(node, IN_FAST, many)
    index.replace(node, IN_FAST, many[:1])
    assert index.num_held(node) == 500, "one slice was looked at"
    index.discard(node, IN_FAST, many[2:4])
    index.add(node, IN_FAST, many[3:6])
    index.sweep()
    assert not index.sweeps and index.num_held(node) == 4
    assert [bool(index.match([key]).steps) for key in many[:7]] == [True, False, False, True, True, True, False]
    index.check_integrity()


def test_a_holder_without_entries_needs_no_sweep(index: PrefixIndex) -> None:
    node, other = index.add_holder(), index.add_holder()
    index.add(other, IN_FAST, blocks(1, 2, 3))
    index.replace(node, IN_FAST, blocks(1))
    assert not index.sweeps
    index.discard(node, IN_FAST, blocks(1))
    index.remove_holder(node)
    index.sweep(1)
    assert not index.sweeps and index.add_holder() == node


def test_masks_are_shared_by_blocks_with_the_same_holders(index: PrefixIndex) -> None:
    a, b = index.add_holder(), index.add_holder()
    for slot in (a, b):
        for number in range(50):
            index.add(slot, IN_FAST, blocks(number))
    assert len({id(mask) for mask in index._masks.values()}) == 1


class _Model:
    """Sets, and no cleverness."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.tiers: dict[int, dict[int, set[bytes]]] = {}
        self.predicted: dict[int, dict[bytes, int]] = {}

    def add_holder(self) -> None:
        slot = self.index.add_holder()
        assert slot not in self.tiers
        self.tiers[slot] = {IN_FAST: set(), IN_SLOW: set()}
        self.predicted[slot] = {}

    def add(self, slot: int, tier: int, keys: tuple[bytes, ...]) -> None:
        self.index.add(slot, tier, keys)
        self.tiers[slot][tier].update(keys)
        for key in keys:
            self.predicted[slot].pop(key, None)

    def discard(self, slot: int, tier: int, keys: tuple[bytes, ...]) -> None:
        self.index.discard(slot, tier, keys)
        self.tiers[slot][tier].difference_update(keys)

    def replace(self, slot: int, tier: int, keys: tuple[bytes, ...]) -> None:
        self.index.replace(slot, tier, keys)
        self.tiers[slot][tier] = set()
        while self.index.sweeps:  # the index is small, so it is the removals that are in the way
            self.index.sweep(7)
        self.tiers[slot][tier].update(keys)
        for key in keys:
            self.predicted[slot].pop(key, None)

    def predict(self, slot: int, keys: tuple[bytes, ...], expires: int) -> None:
        self.index.predict(slot, keys, expires)
        held = self.tiers[slot][IN_FAST] | self.tiers[slot][IN_SLOW]
        self.predicted[slot].update({key: expires for key in keys if key not in held})

    def expire(self, now: int) -> None:
        self.index.expire(now)
        for slot, keys in self.predicted.items():
            self.predicted[slot] = {key: expires for key, expires in keys.items() if expires > now}

    def remove(self, slot: int) -> None:
        self.index.remove_holder(slot)
        del self.tiers[slot], self.predicted[slot]

    def lengths(self, slot: int, query: tuple[bytes, ...]) -> list[int]:
        fast = self.tiers[slot][IN_FAST]
        stored = fast | self.tiers[slot][IN_SLOW]
        return [
            next((at for at, key in enumerate(query) if key not in has), len(query))
            for has in (fast, stored, stored | self.predicted[slot].keys())
        ]


@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_model(seed: int) -> None:
    """Random operations on up to 20 holders, keys twice in a message included."""
    rng = random.Random(seed)
    index = PrefixIndex(10_000)
    model = _Model(index)
    for now in range(2_000):
        slots = list(model.tiers)
        if (len(slots) < 20 and rng.random() < 0.1) or not slots:
            model.add_holder()
            continue
        slot, tier = rng.choice(slots), rng.choice([IN_FAST, IN_FAST, IN_SLOW])
        keys = blocks(*(rng.randrange(30) for _ in range(rng.randrange(8))))
        action = rng.choice(["add", "add", "add", "discard", "replace", "predict", "predict", "expire", "sweep"])
        if rng.random() < 0.01:
            model.remove(slot)
        elif action == "predict":
            model.predict(slot, keys, now + rng.randrange(50))
        elif action == "expire":
            model.expire(now)
        elif action == "sweep":
            index.sweep(rng.randrange(1, 20))
        else:
            getattr(model, action)(slot, tier, keys)
        query = blocks(*(rng.randrange(30) for _ in range(6)))
        match = index.match(query)
        for holder in model.tiers:
            expected = model.lengths(holder, query)
            assert match.lengths[:, holder].tolist() == expected
            assert list(match.reach(reach_bits(holder, holder))) == [expected[0], expected[2], expected[1]]
        if now % 50 == 0:
            index.check_integrity()
