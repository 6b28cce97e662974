"""Block keys and object keys.

A block key is a chained BLAKE2b hash of 16 bytes: a pure function of model fingerprint, LoRA fingerprint, salt, extras, the
parent's key and the block's token ids. It is the same in every process, on every machine and under every PYTHONHASHSEED.
The hash is a cryptographic one because a tenant who could craft a collision would read another tenant's cache.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence

import numpy as np

KEY_BYTES = 16
SHARD_BYTES = 8
OBJECT_KEY_BYTES = KEY_BYTES + SHARD_BYTES
_VERSION = b"mooncake.block.v1"
_SCOPED_VERSION = b"mooncake.block.v1.scoped"


def root_key(fingerprint: str, *, lora: str = "", salt: str = "", extras: Sequence[str] = (), scope: str = "") -> bytes:
    """Parent of a sequence's first block. Each part is length-prefixed, so that no two lists of parts collide. scope: who may
    share it, such as a tenant; whatever the other parts say, two scopes have no key in common, nor has one with none."""
    digest = hashlib.blake2b(_SCOPED_VERSION if scope else _VERSION, digest_size=KEY_BYTES)
    scopes = (scope,) if scope else ()
    for part in (*scopes, fingerprint, lora, salt, *extras):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def block_keys(root: bytes, token_ids: Sequence[int] | bytes, block_tokens: int) -> tuple[bytes, ...]:
    """Keys of the full blocks of a sequence, first block first. `token_ids` may be given as uint32 bytes.

    Tokens after the last full block have no key. Raises ValueError if block_tokens is not positive."""
    if block_tokens <= 0:
        raise ValueError(f"block_tokens must be positive, got {block_tokens}")
    data = token_ids if isinstance(token_ids, bytes) else np.asarray(token_ids, dtype="<u4").tobytes()
    step = 4 * block_tokens
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(data) - step + 1, step):
        parent = hashlib.blake2b(parent + data[start : start + step], digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return tuple(keys)


def partial_key(root: bytes, frontend: str, request: int, choice: int, attempt: int) -> bytes:
    """Key of the object that holds a hand-over's last, partial block; it belongs to one attempt and is never shared."""
    name = f"{frontend}\0{request}\0{choice}\0{attempt}".encode()
    return hashlib.blake2b(root + b"partial" + name, digest_size=KEY_BYTES).digest()


def tail_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the object with the tokens after the last full block, whose key (or the root) is `parent`: a pure function of
    these tokens, so that whoever has the same prompt finds it."""
    data = np.asarray(token_ids, dtype="<u4").tobytes()
    return hashlib.blake2b(parent + b"tail" + data, digest_size=KEY_BYTES).digest()


def shard_id(
    kv_dtype: str, layout: str, tp_rank: int = 0, tp_size: int = 1, pp_rank: int = 0, pp_size: int = 1
) -> bytes:
    """What tells apart the objects that hold the same block for differently cut or stored KV."""
    name = f"{kv_dtype}\0{layout}\0{tp_rank}/{tp_size}\0{pp_rank}/{pp_size}".encode()
    return hashlib.blake2b(name, digest_size=SHARD_BYTES).digest()


def object_key(block_key: bytes, shard: bytes) -> bytes:
    return block_key + shard


def object_keys(block_keys: Sequence[bytes], shard: bytes) -> tuple[bytes, ...]:
    """`object_key` of each. A long prompt has hundreds, which are cut from one piece in half the time."""
    return _cutter(f"{OBJECT_KEY_BYTES}s", len(block_keys)).unpack(shard.join((*block_keys, b"")))


def block_keys_of(object_keys: Sequence[bytes]) -> tuple[bytes, ...]:
    """The other way round, whatever their shards are."""
    return _cutter(f"{KEY_BYTES}s{SHARD_BYTES}x", len(object_keys)).unpack(b"".join(object_keys))


@functools.lru_cache(maxsize=1024)
def _cutter(piece: str, count: int) -> struct.Struct:
    return struct.Struct(piece * count)
