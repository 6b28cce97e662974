"""The page pool on twelve pages of four tokens, two pages a block."""

import random

import pytest

from mooncake.engine.page_pool import PagePool

K = [bytes([number]) for number in range(32)]


def pool(num_pages: int = 12, row_pages: int = 1) -> PagePool:
    return PagePool(num_pages, page_tokens=4, block_tokens=8, row_pages=row_pages)


def fill(pages: PagePool, seq: int, num_blocks: int, first_key: int = 0) -> None:
    """A sequence that computed and published its blocks, and went."""
    assert pages.allocate(seq, [], num_blocks * 8)
    for index in range(num_blocks):
        pages.publish(seq, index, [K[first_key + index]])
    pages.free(seq)


def test_allocation_is_all_or_nothing() -> None:
    pages = pool(4)
    assert pages.allocate(1, [], 9) and pages.pages(1) == [0, 1, 2]
    assert not pages.allocate(2, [], 5) and pages.num_free == 1
    assert not pages.extend(1, 17) and pages.pages(1) == [0, 1, 2]
    assert pages.extend(1, 12) and pages.pages(1) == [0, 1, 2]
    assert pages.extend(1, 13) and pages.pages(1) == [0, 1, 2, 3]
    pages.check_integrity()


def test_published_blocks_are_found_and_shared() -> None:
    pages = pool()
    fill(pages, 1, 2)
    assert pages.match([K[0], K[1], K[2]]) == 2 and pages.match([K[1]]) == 1 and pages.match([K[5], K[0]]) == 0
    assert pages.allocate(2, K[:2], 20) and pages.allocate(3, K[:1], 12)
    assert pages.pages(2)[:4] == [0, 1, 2, 3] and pages.pages(3)[:2] == [0, 1]
    pages.check_integrity()
    pages.free(2)
    pages.free(3)
    assert pages.num_free == 12 and set(pages.cached_keys()) == {K[0], K[1]}
    pages.check_integrity()


def test_a_chain_that_is_shared_in_part_is_let_go_of_in_parts() -> None:
    pages = pool()
    assert pages.allocate(1, [], 24)
    pages.publish(1, 0, K[:3])
    assert pages.allocate(2, K[:1], 8) and pages.allocate(3, K[:2], 16)
    pages.check_integrity()
    pages.free(1)
    assert pages.num_free == 8, "the first two blocks are still held"
    pages.free(3)
    assert pages.num_free == 10
    pages.check_integrity()
    assert pages.allocate(4, K[:3], 24) and pages.pages(4) == [0, 1, 2, 3, 4, 5]
    pages.free(2)
    pages.free(4)
    pages.check_integrity()
    assert pages.allocate(5, [], 40), "evicts from the end of the chain"
    assert pages.cached_keys() == (K[0],)
    pages.check_integrity()


def test_a_block_in_the_middle_of_a_chain_can_be_had_alone() -> None:
    pages = pool()
    fill(pages, 1, 1)
    assert pages.allocate(2, [], 24)
    pages.publish(2, 0, K[4:7])
    pages.free(2)
    assert pages.allocate(3, [K[0], K[5]], 16) and pages.pages(3) == [0, 1, 4, 5]
    pages.check_integrity()
    assert pages.match(K[4:7]) == 3 and pages.num_free == 8
    pages.free(3)
    pages.check_integrity()


def test_blocks_behind_one_that_somebody_else_published_are_published() -> None:
    pages = pool()
    assert pages.allocate(1, [], 8) and pages.allocate(2, [], 24)
    pages.publish(1, 0, K[:1])
    pages.publish(2, 0, K[:3])
    assert pages.match(K[:3]) == 3
    pages.check_integrity()
    pages.free(2)
    assert pages.num_free == 10, "its copy of the first block is free"
    assert pages.allocate(3, K[:3], 24) and pages.pages(3) == [0, 1, *pages.pages(3)[2:]]
    pages.check_integrity()


def test_eviction_takes_the_least_recently_used_and_the_suffix_first() -> None:
    pages = pool(8)
    fill(pages, 1, 2, first_key=0)
    fill(pages, 2, 2, first_key=10)
    assert pages.allocate(3, [K[0]], 8)  # used again, so younger than 10 and 11
    pages.free(3)
    assert pages.allocate(4, [], 8)
    assert set(pages.cached_keys()) == {K[0], K[10], K[11]}, "1 was the suffix of the oldest chain"
    assert pages.allocate(5, [], 8)
    assert set(pages.cached_keys()) == {K[0], K[10]}
    pages.check_integrity()


def test_held_blocks_are_never_evicted() -> None:
    pages = pool(4)
    fill(pages, 1, 1)
    assert pages.allocate(2, [K[0]], 8)
    assert not pages.allocate(3, [], 16) and pages.num_free == 2
    assert not pages.allocate(3, [K[0]], 20), "what it reuses does not count as room"
    assert pages.cached_keys() == (K[0],)
    pages.check_integrity()


def test_changes_are_told_once_and_net() -> None:
    pages = pool(4)
    fill(pages, 1, 2)
    assert pages.drain_changes() == ((K[0], K[1]), ())
    fill(pages, 2, 2, first_key=5)
    assert pages.drain_changes() == ((K[5], K[6]), (K[1], K[0]))
    fill(pages, 3, 1, first_key=7)
    assert pages.allocate(4, [], 16)
    assert pages.drain_changes() == ((), (K[6], K[5])), "7 came and went between"
    assert pages.drain_changes() == ((), ())


def test_a_key_is_published_once() -> None:
    pages = pool()
    for seq in (1, 2):
        assert pages.allocate(seq, [], 8)
        pages.publish(seq, 0, K[:1])
    assert pages.drain_changes() == ((K[0],), ())
    pages.free(1)
    pages.free(2)
    assert pages.num_free == 12
    pages.check_integrity()


def test_sequences_start_on_rows_and_grow_in_place() -> None:
    pages = pool(12, row_pages=4)
    assert pages.allocate(1, [], 4) and pages.allocate(2, [], 8) and pages.allocate(3, [], 4)
    assert [pages.pages(seq) for seq in (1, 2, 3)] == [[0], [4, 5], [8]]
    assert pages.extend(1, 12) and pages.pages(1) == [0, 1, 2]
    assert pages.allocate(4, [], 16) and sorted(pages.pages(4)) == [3, 9, 10, 11], "rows are a wish, not a condition"
    pages.check_integrity()


def test_blocks_must_be_whole_pages() -> None:
    with pytest.raises(ValueError, match="block_tokens 10 is not a multiple of page_tokens 4"):
        PagePool(4, page_tokens=4, block_tokens=10)


@pytest.mark.parametrize("seed", range(50))
def test_random_histories_leak_nothing(seed: int) -> None:
    rng = random.Random(seed)
    pages = pool(10, row_pages=rng.choice([1, 3]))
    tokens: dict[int, tuple[list[bytes], int]] = {}
    for step in range(120):
        if tokens and rng.random() < 0.4:
            pages.free(seq := rng.choice(list(tokens)))
            del tokens[seq]
        elif tokens and rng.random() < 0.5:
            seq = rng.choice(list(tokens))
            keys, count = tokens[seq]
            if pages.extend(seq, count + 3):
                tokens[seq] = (keys, count + 3)
            for index in range(min(len(keys), tokens[seq][1] // 8)):
                pages.publish(seq, index, keys[index : index + 1])
        else:
            chain = rng.randrange(3) * 10
            keys = K[chain : chain + 3]
            matched = pages.match(keys)
            count = rng.randrange(matched * 8 + 1, 30)
            if pages.allocate(step, keys[:matched], count):
                tokens[step] = (keys, count)
        pages.check_integrity()
    for seq in tokens:
        pages.free(seq)
    assert pages.num_free == 10
