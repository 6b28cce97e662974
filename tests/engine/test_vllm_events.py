"""vLLM's KV events in our keys: both forms, gaps, beginnings anew."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from mooncake.core.keys import block_keys, root_key
from mooncake.engine.vllm.events import (
    CachedBlocks,
    Cleared,
    EventOrder,
    KvEvent,
    Removed,
    Stored,
    decode_batch,
    salt_of,
)

PAGE, BLOCK = 4, 8
TOKENS = tuple(range(24))
KEYS = block_keys(root_key("model"), TOKENS, BLOCK)
SALT = salt_of(KEYS[0])


def stored(first: int, count: int, parent: Any = None, tokens: tuple[int, ...] = TOKENS, salt: str = SALT) -> Stored:
    """Pages [first, first + count) of the sequence, each called by its number."""
    hashes = tuple(range(first, first + count))
    extras = ((salt,) if first == 0 else (), *[()] * (count - 1))
    return Stored(hashes, parent, tokens[first * PAGE : (first + count) * PAGE], PAGE, extras)


def pack(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def test_maps_and_arrays_say_the_same() -> None:
    new = {
        "type": "BlockStored", "block_hashes": [b"h1"], "parent_block_hash": None, "token_ids": [1, 2], "block_size": 2,
        "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [["salt"]], "group_idx": 0,
    }  # fmt: skip
    old = ["BlockStored", [b"h1"], None, [1, 2], 2, None, "GPU", None, [["salt"]]]
    expected: list[KvEvent] = [Stored((b"h1",), None, (1, 2), 2, (("salt",),))]
    assert decode_batch(pack(new)) == decode_batch(pack(old)) == expected
    assert decode_batch(pack(["BlockStored", [7], 6, [1, 2], 2, None])) == [Stored((7,), 6, (1, 2), 2)]
    removed = [{"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}, ["BlockRemoved", [8]]]
    assert decode_batch(pack(*removed)) == [Removed((7,)), Removed((8,))]
    assert decode_batch(pack({"type": "AllBlocksCleared"}, ["AllBlocksCleared"])) == [Cleared(), Cleared()]


def test_other_media_and_unknown_kinds_are_passed_over_and_garbage_is_an_error() -> None:
    assert decode_batch(pack({"type": "BlockRemoved", "block_hashes": [7], "medium": "STORAGE"}, ["Novel", 1])) == []
    for payload in (b"", b"\xc1", msgspec.msgpack.encode(3), pack(7), pack({"no": "type"}), pack(["BlockRemoved"])):
        with pytest.raises(ValueError, match="no batch of KV events"):
            decode_batch(payload)


def test_a_block_is_cached_when_all_its_pages_are_and_until_one_goes() -> None:
    blocks = CachedBlocks(BLOCK)
    assert blocks.apply([stored(0, 1)]) == ((), ())
    assert blocks.apply([stored(1, 2, parent=0)]) == (KEYS[:1], ())
    assert blocks.apply([stored(3, 3, parent=2)]) == (KEYS[1:], ())
    assert blocks.apply([stored(0, 6)]) == ((), ()), "told once more"
    assert blocks.keys() == KEYS
    assert blocks.apply([Removed((3,))]) == ((), KEYS[1:2])
    assert blocks.apply([Removed((3, 2, 99))]) == ((), ())
    assert blocks.apply([stored(2, 2, parent=1)]) == (KEYS[1:2], ()), "computed again"
    assert blocks.apply([Cleared()]) == ((), (KEYS[0], KEYS[2], KEYS[1]))
    assert blocks.keys() == ()


def test_what_comes_and_goes_in_one_batch_is_no_change() -> None:
    blocks = CachedBlocks(BLOCK)
    assert blocks.apply([stored(0, 2), Removed((1,))]) == ((), ())
    assert blocks.apply([stored(0, 2)]) == (KEYS[:1], ())
    assert blocks.apply([Removed((0,)), stored(0, 2)]) == ((), ())


def test_pages_behind_what_was_not_told_and_sequences_that_are_not_ours_have_no_keys() -> None:
    blocks = CachedBlocks(BLOCK)
    assert blocks.apply([stored(2, 2, parent=1)]) == ((), ())
    assert blocks.apply([stored(0, 4, salt="alone.7")]) == ((), ())
    assert blocks.keys() == ()


def test_sequences_that_part_share_their_beginning() -> None:
    blocks = CachedBlocks(BLOCK)
    other = (*TOKENS[:8], *range(100, 116))
    theirs = block_keys(root_key("model"), other, BLOCK)
    blocks.apply([stored(0, 4)])
    branch = Stored((50, 51), 1, other[8:16], PAGE)
    assert blocks.apply([branch]) == (theirs[1:2], ())
    assert set(blocks.keys()) == {*KEYS[:2], theirs[1]}
    assert blocks.apply([Removed((51, 3))]) == ((), (theirs[1], KEYS[1]))


def test_gaps_repetitions_and_beginnings_anew_are_seen() -> None:
    order = EventOrder()
    assert not order.missing(0) and order.take(0) and order.take(1)
    assert not order.take(1), "a repetition"
    assert order.missing(5) and not order.missing(2)
    assert order.take(5) and order.next == 6
    assert order.began_anew(0) and not order.began_anew(3)
    assert order.take(0) and order.next == 1


def test_whatever_comes_and_goes_the_blocks_are_those_whose_pages_are_all_there() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    blocks, present = CachedBlocks(BLOCK), [False] * 6
    known: set[bytes] = set()
    for _ in range(300):
        if rng.random() < 0.6:
            first = rng.randrange(6)
            count = rng.randrange(1, 7 - first)
            event: KvEvent = stored(first, count, parent=first - 1 if first else None)
            for page in range(first, first + count):
                if not present[page] and page and not present[page - 1]:
                    break  # what it follows is not known
                present[page] = True
        else:
            page = rng.randrange(6)
            event, present[page] = Removed((page,)), False
        added, removed = blocks.apply([event])
        known = (known | set(added)) - set(removed)
        assert known == set(blocks.keys())
        assert known <= {key for at, key in enumerate(KEYS) if present[2 * at] and present[2 * at + 1]}
