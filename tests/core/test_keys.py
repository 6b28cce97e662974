"""Block keys: fixed vectors, chaining, and what tells keys apart."""

import subprocess
import sys

import pytest

from mooncake.core.keys import (
    KEY_BYTES,
    block_keys,
    block_keys_of,
    object_key,
    object_keys,
    partial_key,
    root_key,
    shard_id,
)

VECTORS = {
    "root": "3409e744904f0904de7e2ca9754c1202",
    "first": "5d2b3602c351d349700e0d3c95f97504",
    "second": "50284785c39cc825ac7beb62323bd5d5",
    "partial": "0a293b48fa272ffb85d3640e293643cf",
    "shard": "3d6b1ddd45549829",
}
PRINT_KEYS = """
from mooncake.core.keys import *
root = root_key("model", lora="l", salt="s", extras=("image",))
keys = block_keys(root, list(range(10)), 4)
print(root.hex(), keys[0].hex(), keys[1].hex(), partial_key(root, "f", 7, 1, 2).hex(), shard_id("bfloat16", "kv.3x64").hex())
"""


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_vectors_hold_in_every_process(hash_seed: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", PRINT_KEYS],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == list(VECTORS.values())


def test_only_full_blocks_have_keys() -> None:
    root = root_key("model")
    assert block_keys(root, [1, 2, 3], 4) == ()
    assert len(block_keys(root, range(8), 4)) == 2 == len(block_keys(root, range(11), 4))
    assert all(len(key) == KEY_BYTES for key in block_keys(root, range(8), 4))


def test_tokens_and_their_bytes_give_the_same_keys() -> None:
    root = root_key("model")
    tokens = [0, 1, 49151, 2**32 - 1]
    packed = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert block_keys(root, tokens, 2) == block_keys(root, packed, 2)


def test_a_key_depends_on_everything_before_it() -> None:
    root = root_key("model")
    keys, other = block_keys(root, [1, 2, 3, 4], 2), block_keys(root, [9, 2, 3, 4], 2)
    assert keys[0] != other[0] and keys[1] != other[1]
    assert block_keys(root, [1, 2, 9, 9], 2)[0] == keys[0]


def test_parts_of_a_root_do_not_run_into_each_other() -> None:
    roots = [
        root_key("ab", salt="c"),
        root_key("a", salt="bc"),
        root_key("ab", lora="c"),
        root_key("ab", extras=("c",)),
        root_key("ab", salt="c", extras=("",)),
    ]
    assert len(set(roots)) == len(roots)


def test_partial_keys_belong_to_one_attempt() -> None:
    root = root_key("model")
    assert len({partial_key(root, f, r, c, a) for f in "ab" for r in (1, 2) for c in (0, 1) for a in (0, 1)}) == 16


def test_shards_are_told_apart() -> None:
    key = block_keys(root_key("model"), [1], 1)[0]
    shards = [shard_id("bfloat16", "x"), shard_id("float32", "x"), shard_id("bfloat16", "x", tp_rank=1, tp_size=2)]
    assert len({object_key(key, shard) for shard in shards}) == 3
    assert all(object_key(key, shard)[:KEY_BYTES] == key for shard in shards)


def test_a_bad_block_size_is_named() -> None:
    with pytest.raises(ValueError, match="block_tokens must be positive, got 0"):
        block_keys(b"", [1], 0)


def test_keys_of_many_objects_are_those_of_each() -> None:
    blocks, shard = block_keys(root_key("model"), range(10), 2), shard_id("bfloat16", "kv.3x64")
    assert object_keys(blocks, shard) == tuple(object_key(block, shard) for block in blocks)
    assert block_keys_of(object_keys(blocks, shard)) == blocks
    assert object_keys((), shard) == block_keys_of(()) == ()


def test_a_scope_shares_no_key_with_another_or_with_none() -> None:
    """Whatever clients send as a salt: names and salts can not be shifted into each other."""
    parts = ["", "a", "b", "tenant/a", "a\0b", "1"]
    roots = {root_key("f", salt=salt, scope=scope) for salt in parts for scope in parts}
    assert len(roots) == len(parts) ** 2
    assert root_key("f", salt="s", scope="") == root_key("f", salt="s")
    assert root_key("f", salt="f", scope="x") != root_key("x", lora="f", salt="", extras=("f",))
