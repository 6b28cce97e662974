"""The directory's frames: the store's framing, kinds of their own.

    node    HELLO ─▶ READY   REGISTER ─▶   ◀─ SNAPSHOT   TOLD, TOLD … ─▶   CHANGED ─▶ ACK   ◀─ COPY   USAGE ─▶   ◀─ USAGE
    client  HELLO ─▶ READY   FIND, WANT ─▶ FOUND   NODES ─▶ NODES

Keys are 24 bytes each, one behind the other; numbers are little-endian.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mooncake.config import QUOTAS_MAX
from mooncake.core.errors import ProtocolError
from mooncake.core.keys import OBJECT_KEY_BYTES
from mooncake.core.messages import NodeInfo
from mooncake.core.types import Tier
from mooncake.store.directory.core import TIERS, Changed, Copy, Find, Found, Told, Want
from mooncake.store.directory.holders import Holder
from mooncake.transport.frames import Frame, pack

_T = TypeVar("_T")
_Usage = Annotated[dict[str, Annotated[int, Meta(ge=0)]], Meta(max_length=QUOTAS_MAX)]
VERSION = 1
MAX_KEYS = 262_144
"""Of one frame."""
MAX_FRAME_BYTES = MAX_KEYS * OBJECT_KEY_BYTES + 65_536
MAX_HELLO_BYTES = 4096
_COUNTS = struct.Struct("<QII")
"""seq, keys added (or told), keys removed"""
_FIRST, _LAST = 16, 32
"""Flags of TOLD, beside the tier's number."""


class Op(enum.IntEnum):
    HELLO = 64
    READY = 65
    REGISTER = 66
    CHANGED = 67
    TOLD = 68
    ACK = 69
    FIND = 70
    WANT = 71
    FOUND = 72
    SNAPSHOT = 73
    COPY = 74
    USAGE = 76
    """From a node: what tenants use there. To a node: what they use elsewhere."""
    NODES = 75
    """Asks for all nodes, and answers it."""


class Hello(msgspec.Struct, frozen=True):
    """cluster: both ends must name the same one."""

    version: int
    cluster: str
    token: str
    name: str


class _CopyHead(msgspec.Struct, frozen=True):
    source: NodeInfo


class _FoundHead(msgspec.Struct, frozen=True):
    unknown: bool
    sets: dict[int, tuple[Holder, ...]]
    nodes: dict[int, NodeInfo]


def encode_hello(hello: Hello) -> bytes:
    return pack(Op.HELLO, msgspec.msgpack.encode(hello))


def decode_hello(frame: Frame) -> Hello:
    if frame.kind != Op.HELLO:
        raise ProtocolError(f"the first frame must be HELLO, got kind {frame.kind}")
    hello = _decode(frame.payload, Hello)
    if hello.version != VERSION:
        raise ProtocolError(f"directory protocol version {hello.version} met version {VERSION}")
    return hello


def encode_register(info: NodeInfo) -> bytes:
    return pack(Op.REGISTER, msgspec.msgpack.encode(info))


def decode_register(frame: Frame) -> NodeInfo:
    return _decode(frame.payload, NodeInfo)


# ---------------------------------------------------------------- reports


def encode_changed(tier: Tier, seq: int, added: Sequence[bytes], removed: Sequence[bytes], number: int) -> bytes:
    """number: comes back in the ACK. Not more than MAX_KEYS keys."""
    payload = _COUNTS.pack(seq, len(added), len(removed)) + b"".join(added) + b"".join(removed)
    return pack(Op.CHANGED, payload, flags=TIERS.index(tier), request=number)


def decode_changed(peer: int, frame: Frame) -> Changed:
    seq, num_added, num_removed = _counts(frame)
    keys = _keys(frame.payload[_COUNTS.size :], num_added + num_removed)
    return Changed(peer, _tier(frame.flags), seq, keys[:num_added], keys[num_added:])


def encode_told(tier: Tier, seq: int, keys: Sequence[bytes]) -> list[bytes]:
    """As many frames as it takes."""
    frames = []
    for first in range(0, max(1, len(keys)), MAX_KEYS):
        part = keys[first : first + MAX_KEYS]
        flags = TIERS.index(tier) | _FIRST * (first == 0) | _LAST * (first + MAX_KEYS >= len(keys))
        frames.append(pack(Op.TOLD, _COUNTS.pack(seq, len(part), 0) + b"".join(part), flags=flags))
    return frames


def decode_told(peer: int, frame: Frame) -> Told:
    seq, num_keys, _ = _counts(frame)
    keys = _keys(frame.payload[_COUNTS.size :], num_keys)
    is_first, is_last = bool(frame.flags & _FIRST), bool(frame.flags & _LAST)
    return Told(peer, _tier(frame.flags & ~(_FIRST | _LAST)), seq, keys, is_first, is_last)


def encode_usage(usage: Mapping[str, int]) -> bytes:
    return pack(Op.USAGE, msgspec.msgpack.encode(usage))


def decode_usage(frame: Frame) -> dict[str, int]:
    """By tenant, bytes."""
    try:
        return msgspec.msgpack.decode(frame.payload, type=_Usage)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"bad USAGE frame: {error}") from error


# ---------------------------------------------------------------- questions


def encode_find(keys: Sequence[bytes], number: int) -> bytes:
    return pack(Op.FIND, b"".join(keys), request=number)


def encode_want(keys: Sequence[bytes], num_replicas: int, number: int) -> bytes:
    return pack(Op.WANT, b"".join(keys), count=num_replicas, request=number)


def decode_question(peer: int, frame: Frame) -> Find | Want:
    keys = _keys(frame.payload, len(frame.payload) // OBJECT_KEY_BYTES)
    if frame.kind == Op.FIND:
        return Find(peer, frame.request, keys)
    if not frame.count:
        raise ProtocolError("WANT of 0 replicas")
    return Want(peer, frame.request, keys, frame.count)


def encode_nodes(nodes: Sequence[NodeInfo], number: int) -> bytes:
    return pack(Op.NODES, msgspec.msgpack.encode(nodes), request=number)


def decode_nodes(frame: Frame) -> list[NodeInfo]:
    try:
        return msgspec.msgpack.decode(frame.payload, type=list[NodeInfo])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"bad NODES frame: {error}") from error


def encode_found(found: Found) -> bytes:
    head = msgspec.msgpack.encode(_FoundHead(found.unknown, found.sets, found.nodes))
    numbers = struct.pack(f"<{len(found.numbers)}I", *found.numbers)
    return pack(Op.FOUND, struct.pack("<I", len(numbers)) + numbers + head, request=found.request_id)


def decode_found(frame: Frame) -> Found:
    try:
        (num_bytes,) = struct.unpack_from("<I", frame.payload)
        numbers = list(struct.unpack_from(f"<{num_bytes // 4}I", frame.payload, 4))
    except struct.error as error:
        raise ProtocolError(f"FOUND: {error}") from error
    head = _decode(frame.payload[4 + num_bytes :], _FoundHead)
    return Found(0, frame.request, numbers, head.sets, head.nodes, head.unknown)


# ---------------------------------------------------------------- copies


def encode_copy(copy: Copy) -> bytes:
    head = msgspec.msgpack.encode(_CopyHead(copy.source))
    return pack(Op.COPY, struct.pack("<I", len(head)) + head + b"".join(copy.keys))


def decode_copy(frame: Frame) -> tuple[NodeInfo, tuple[bytes, ...]]:
    try:
        (length,) = struct.unpack_from("<I", frame.payload)
    except struct.error as error:
        raise ProtocolError(f"COPY: {error}") from error
    keys = frame.payload[4 + length :]
    return _decode(frame.payload[4 : 4 + length], _CopyHead).source, _keys(keys, len(keys) // OBJECT_KEY_BYTES)


# ---------------------------------------------------------------- parts


def _decode(data: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"bad {kind.__name__.strip('_')} frame: {error}") from error


def _keys(data: bytes, count: int) -> tuple[bytes, ...]:
    if len(data) != count * OBJECT_KEY_BYTES or count > MAX_KEYS:
        raise ProtocolError(f"{count} keys in {len(data)} bytes; a frame has up to {MAX_KEYS}")
    return struct.unpack(f"{OBJECT_KEY_BYTES}s" * count, data)


def _counts(frame: Frame) -> tuple[int, int, int]:
    if len(frame.payload) < _COUNTS.size:
        raise ProtocolError(f"a report of {len(frame.payload)} bytes")
    seq, num_added, num_removed = _COUNTS.unpack_from(frame.payload)
    return seq, num_added, num_removed


def _tier(number: int) -> Tier:
    if number >= len(TIERS):
        raise ProtocolError(f"a report of tier {number}")
    return TIERS[number]
