import random

import pytest

from mooncake.scheduler.prefix_index import ANY, EXPECTED, FAST, IN_FAST, IN_SLOW, PrefixIndex
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
    assert lengths[:, FAST].tolist() == [0, 3, 1, 0]
    assert index.match(()).lengths.tolist() == [[0, 0, 0]] * 4
    index.check_integrity()


def test_levels_are_nested(index: PrefixIndex) -> None:
    node = index.add_holder()
    index.add(node, IN_FAST, blocks(1))
    index.add(node, IN_SLOW, blocks(1, 2))
    index.predict(node, blocks(1, 2, 3), 10)
    assert index.match(blocks(1, 2, 3)).lengths[node].tolist() == [1, 2, 3]
    index.discard(node, IN_FAST, blocks(1))
    assert index.match(blocks(1, 2, 3)).lengths[node].tolist() == [0, 2, 3]
    index.check_integrity()


def test_predictions_expire_unless_confirmed_or_renewed(index: PrefixIndex) -> None:
    slot = index.add_holder()
    index.predict(slot, blocks(1, 2, 3), 10)
    index.add(slot, IN_FAST, blocks(1))
    index.predict(slot, blocks(2), 20)
    assert index.deadline() == 10
    index.expire(10)
    assert index.match(blocks(1, 2, 3)).lengths[slot].tolist() == [1, 1, 2]
    index.expire(20)
    assert index.match(blocks(1, 2, 3)).lengths[slot].tolist() == [1, 1, 1]
    assert index.deadline() is None and len(index) == 1
    index.check_integrity()


def test_full_index_drops_oldest_predictions_then_refuses() -> None:
    index = PrefixIndex(4)
    slot = index.add_holder()
    index.predict(slot, blocks(1, 2), 10)
    index.predict(slot, blocks(3), 20)
    index.add(slot, IN_FAST, blocks(4, 5))
    assert index.match(blocks(3)).lengths[slot, EXPECTED] == 1
    assert index.match(blocks(1)).lengths[slot, EXPECTED] == 0
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
    assert index.match(blocks(1, 2)).lengths[:, ANY].tolist() == [0, 0, 1]
    index.sweep(2)
    new = index.add_holder()
    assert (index.sweeping, new in (old, other)) == (True, False)
    index.sweep(100)
    assert (index.sweeping, len(index)) == (False, 1)
    assert index.add_holder() == old
    assert index.match(blocks(1)).lengths[old].tolist() == [0, 0, 0]
    index.expire(10)
    index.check_integrity()


def test_hidden_holder_keeps_its_entries(index: PrefixIndex) -> None:
    slot = index.add_holder()
    index.add(slot, IN_FAST, blocks(1))
    index.hide(slot)
    assert index.match(blocks(1)).lengths[slot, ANY] == 0
    index.show(slot)
    assert index.match(blocks(1)).lengths[slot, ANY] == 1


def test_against_a_plain_model() -> None:
    """Random operations on 20 holders; the walk must agree with sets."""
    rng = random.Random(1)
    index = PrefixIndex(10_000)
    slots = [index.add_holder() for _ in range(20)]
    held: dict[int, set[bytes]] = {slot: set() for slot in slots}
    for _ in range(2_000):
        slot = rng.choice(slots)
        keys = blocks(*(rng.randrange(30) for _ in range(rng.randrange(8))))
        if rng.random() < 0.6:
            index.add(slot, IN_FAST, keys)
            held[slot].update(keys)
        elif rng.random() < 0.8:
            index.discard(slot, IN_FAST, keys)
            held[slot].difference_update(keys)
        else:
            index.replace(slot, IN_FAST, keys)
            held[slot] = set(keys)
        query = blocks(*(rng.randrange(30) for _ in range(6)))
        lengths = index.match(query).lengths
        for holder, keys_held in held.items():
            run = next((i for i, key in enumerate(query) if key not in keys_held), len(query))
            assert lengths[holder].tolist() == [run] * 3
    index.check_integrity()
