"""Control frames of a store node's data port: events and results as bytes. Pure; both ends use it.

A connection begins with HELLO, answered by WELCOME (control), OK (data) or ERROR and the end. Then requests, pipelined;
each is answered by REPLY or ERROR with its request number, in any order. Numbers, sizes and checksums are u64, keys 24
bytes, all little-endian and packed one kind after the other, so that a batch is one struct call.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import TypeVar

import msgspec

from mooncake.core.errors import AuthError, BadArgument, ProtocolError, StoreError, StoreUnavailable
from mooncake.core.keys import OBJECT_KEY_BYTES
from mooncake.store.events import (
    MAX_BATCH,
    TENANT_BYTES_MAX,
    Cancel,
    Commit,
    Exists,
    Grant,
    Lease,
    Name,
    Release,
    Remove,
    Request,
    Reserve,
    Results,
)
from mooncake.store.types import CommitStatus, Places, PutMode, Puts, PutStatus
from mooncake.transport.frames import ErrorCode, Frame, Kind, pack, pack_error

_T = TypeVar("_T")
VERSION = 3
TELLS_LOADED = 1
"""The minor version from which on a lease's answer may say how many objects were read from SSD for it."""
MINOR = TELLS_LOADED
MAX_CONTROL_BYTES = MAX_BATCH * (OBJECT_KEY_BYTES + 16) + 4096
MAX_HELLO_BYTES = 4096


class Op(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    REPLY = 3
    RESERVE = 8
    COMMIT = 9
    CANCEL = 10
    LEASE = 11
    RELEASE = 12
    EXISTS = 13
    REMOVE = 14
    ATTACH = 15
    """Payload: path of the client's table. Answered by OK or ERROR."""
    GRANT = 17
    NAME = 18
    SYNC = 16
    """Answered by OK as soon as the directory knows all that was committed until now, or by ERROR."""


class Flag(enum.IntFlag):
    LEASE = 1
    ALL_OR_NOTHING = 2
    EPHEMERAL = 4
    STRICT = 8
    CHECKSUMS = 16
    EPHEMERAL_LAST = 32
    DAMAGED = 64
    TENANT = 128
    """The payload ends with the tenant's name. Only to nodes that say in their WELCOME that they charge tenants."""


class ReplyFlag(enum.IntFlag):
    """Of a REPLY, beside Flag.CHECKSUMS."""

    LOADED = 1
    """To a LEASE: the payload ends with the number of objects that were read from SSD for it."""


class Hello(msgspec.Struct, frozen=True):
    """session: empty to open one; that of the WELCOME to add a data connection to it. minor: what the client knows beyond what
    all of that version do."""

    version: int
    token: str
    client: str
    tenant: str
    session: bytes = b""
    minor: int = 0


class Welcome(msgspec.Struct, frozen=True):
    """segment: path of the shared segment. session: a secret that admits data connections. num_entries: of the index in front
    of the segment, 0 if there is none. alignment: what sizes are rounded up to. charges_tenants: whether the node has quotas,
    so that requests say for whom they are."""

    node: str
    epoch: int
    capacity: int
    segment: str
    session: bytes
    num_entries: int = 0
    alignment: int = 4096
    charges_tenants: bool = False


def encode_hello(hello: Hello) -> bytes:
    return pack(Op.HELLO, msgspec.msgpack.encode(hello))


def decode_hello(frame: Frame) -> Hello:
    if frame.kind != Op.HELLO:
        raise ProtocolError(f"the first frame must be HELLO, got kind {frame.kind}")
    hello = _decode_struct(frame, Hello)
    if hello.version != VERSION:
        raise ProtocolError(f"protocol version {hello.version} met version {VERSION}")
    return hello


def encode_welcome(welcome: Welcome) -> bytes:
    return pack(Op.WELCOME, msgspec.msgpack.encode(welcome))


def decode_welcome(frame: Frame) -> Welcome:
    if frame.kind != Op.WELCOME:
        raise ProtocolError(f"HELLO must be answered by WELCOME, got kind {frame.kind}")
    return _decode_struct(frame, Welcome)


# ---------------------------------------------------------------- requests


def encode_request(event: Request) -> bytes:
    op = _OPS[type(event)]
    flags = 0
    match event:
        case Reserve():
            flags = (
                Flag.LEASE * event.lease_existing
                | Flag.ALL_OR_NOTHING * event.all_or_nothing
                | Flag.EPHEMERAL * event.ephemeral
                | Flag.EPHEMERAL_LAST * event.ephemeral_last
                | Flag.STRICT * (event.mode is PutMode.STRICT)
                | Flag.CHECKSUMS * bool(event.checksums)
                | Flag.TENANT * bool(event.tenant)
            )
            payload = b"".join(event.keys) + _u64s(event.sizes) + _u64s(event.checksums) + event.tenant.encode()
            return pack(op, payload, flags=flags, count=len(event.keys), request=event.request_id)
        case Commit():
            flags = Flag.LEASE * event.lease | Flag.CHECKSUMS * bool(event.checksums)
            payload = _u64s(event.numbers) + (_encode_checksums(event.checksums) if event.checksums else b"")
            return pack(op, payload, flags=flags, count=len(event.numbers), request=event.request_id)
        case Grant():
            return pack(op, _u64s(event.sizes), count=len(event.sizes), request=event.request_id)
        case Name():
            flags = Flag.CHECKSUMS * bool(event.checksums)
            sums = _encode_checksums(event.checksums) if event.checksums else b""
            payload = b"".join((*event.keys, _u64s(event.numbers + event.sizes), sums))
            return pack(op, payload, flags=flags, count=len(event.keys), request=event.request_id)
        case Cancel() | Release():
            return pack(op, _u64s(event.numbers), count=len(event.numbers), request=event.request_id)
        case Lease():
            payload = b"".join(event.keys) + event.tenant.encode()
            flags = Flag.TENANT * bool(event.tenant)
            return pack(op, payload, flags=flags, count=len(event.keys), request=event.request_id)
        case Exists() | Remove():
            flags = Flag.DAMAGED * (isinstance(event, Remove) and event.damaged)
            return pack(op, b"".join(event.keys), flags=flags, count=len(event.keys), request=event.request_id)
    raise TypeError(f"not a request: {event!r}")


def decode_request(client: int, frame: Frame) -> Request:
    """Raises ProtocolError if the frame is not a request, or not as long as its count says."""
    decode = _DECODERS.get(frame.kind)
    if decode is None:
        raise ProtocolError(f"kind {frame.kind} is not a request")
    return decode(client, frame)


def _decode_reserve(client: int, frame: Frame) -> Request:
    n, flags = frame.count, frame.flags
    num_sums = n if flags & Flag.CHECKSUMS else 0
    tenant = _take_tenant(frame, n * (OBJECT_KEY_BYTES + 8) + num_sums * 8)
    values = struct.unpack_from(f"<{'24s' * n}{n + num_sums}Q", frame.payload)
    return Reserve(
        client,
        frame.request,
        keys=values[:n],
        sizes=values[n : 2 * n],
        mode=PutMode.STRICT if flags & Flag.STRICT else PutMode.EQUIVALENT,
        lease_existing=bool(flags & Flag.LEASE),
        all_or_nothing=bool(flags & Flag.ALL_OR_NOTHING),
        ephemeral=bool(flags & Flag.EPHEMERAL),
        ephemeral_last=bool(flags & Flag.EPHEMERAL_LAST),
        checksums=values[2 * n :],
        tenant=tenant,
    )


def _decode_commit(client: int, frame: Frame) -> Request:
    n, lease = frame.count, bool(frame.flags & Flag.LEASE)
    if not frame.flags & Flag.CHECKSUMS:
        _expect_length(frame, n * 8)
        return Commit(client, frame.request, struct.unpack(f"<{n}Q", frame.payload), lease)
    _expect_length(frame, n * 17)
    numbers = struct.unpack_from(f"<{n}Q", frame.payload)
    return Commit(client, frame.request, numbers, lease, _decode_checksums(n, frame.payload[8 * n :]))


def _decode_grant(client: int, frame: Frame) -> Request:
    _expect_length(frame, frame.count * 8)
    return Grant(client, frame.request, struct.unpack(f"<{frame.count}Q", frame.payload))


def _decode_name(client: int, frame: Frame) -> Request:
    n, payload = frame.count, frame.payload
    has_sums, sums_at = bool(frame.flags & Flag.CHECKSUMS), n * (OBJECT_KEY_BYTES + 16)
    _expect_length(frame, sums_at + 9 * n * has_sums)
    values = struct.unpack_from(f"<{'24s' * n}{2 * n}Q", payload)
    sums = _decode_checksums(n, payload[sums_at:]) if has_sums else ()
    return Name(client, frame.request, values[:n], values[n : 2 * n], values[2 * n :], sums)


def _numbers_decoder(make: type[Cancel | Release]) -> Callable[[int, Frame], Request]:
    def decode(client: int, frame: Frame) -> Request:
        _expect_length(frame, frame.count * 8)
        return make(client, frame.request, struct.unpack(f"<{frame.count}Q", frame.payload))

    return decode


def _decode_lease(client: int, frame: Frame) -> Request:
    tenant = _take_tenant(frame, frame.count * OBJECT_KEY_BYTES)
    return Lease(client, frame.request, _decode_keys(frame), tenant)


def _decode_exists(client: int, frame: Frame) -> Request:
    _expect_length(frame, frame.count * OBJECT_KEY_BYTES)
    return Exists(client, frame.request, _decode_keys(frame))


def _decode_remove(client: int, frame: Frame) -> Request:
    _expect_length(frame, frame.count * OBJECT_KEY_BYTES)
    return Remove(client, frame.request, _decode_keys(frame), bool(frame.flags & Flag.DAMAGED))


def _decode_keys(frame: Frame) -> tuple[bytes, ...]:
    return struct.unpack_from("<" + "24s" * frame.count, frame.payload)


def _take_tenant(frame: Frame, length: int) -> str:
    """The name behind the payload proper, which has that length; empty if there is none."""
    if not frame.flags & Flag.TENANT:
        _expect_length(frame, length)
        return ""
    name = frame.payload[length:]
    if not 0 < len(name) <= TENANT_BYTES_MAX:
        raise ProtocolError(f"a tenant's name has 1 to {TENANT_BYTES_MAX} bytes, got {len(frame.payload) - length}")
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a tenant's name is not UTF-8: {error.reason}") from None


_OPS: dict[type[Request], Op] = {
    Reserve: Op.RESERVE,
    Commit: Op.COMMIT,
    Grant: Op.GRANT,
    Name: Op.NAME,
    Cancel: Op.CANCEL,
    Lease: Op.LEASE,
    Release: Op.RELEASE,
    Exists: Op.EXISTS,
    Remove: Op.REMOVE,
}
_DECODERS: dict[int, Callable[[int, Frame], Request]] = {
    Op.RESERVE: _decode_reserve,
    Op.COMMIT: _decode_commit,
    Op.GRANT: _decode_grant,
    Op.NAME: _decode_name,
    Op.CANCEL: _numbers_decoder(Cancel),
    Op.LEASE: _decode_lease,
    Op.RELEASE: _numbers_decoder(Release),
    Op.EXISTS: _decode_exists,
    Op.REMOVE: _decode_remove,
}


# ---------------------------------------------------------------- results

_PUT_STATUSES = tuple(PutStatus).__getitem__  # a tenth of the time of calling the class
_COMMIT_STATUSES = tuple(CommitStatus).__getitem__


def encode_reply(request_id: int, results: Results, minor: int = MINOR) -> bytes:
    """minor: of the client."""
    flags = 0
    if isinstance(results, Puts):
        payload = bytes(results.statuses) + _encode_places(results)
    elif isinstance(results, Places):
        payload = _encode_places(results)
        if results.checksums:
            flags, payload = Flag.CHECKSUMS, payload + _encode_checksums(results.checksums)
        if results.num_loaded and minor >= TELLS_LOADED:
            flags, payload = flags | ReplyFlag.LOADED, payload + _u64s((results.num_loaded,))
    else:
        payload = bytes(results)  # statuses and bools are small integers
    return pack(Op.REPLY, payload, flags=flags, count=len(results), request=request_id)


def decode_reply(event: Request, frame: Frame) -> Results:
    """The results of `event`, which the frame answers. Raises ProtocolError if they cannot be."""
    n, payload = frame.count, frame.payload
    try:
        if n != _num_items(event):
            raise ValueError(f"{n} results")
        match event:
            case Reserve():
                places = _decode_places(n, payload[n:], checksums=False)
                return Puts(
                    places.offsets, places.sizes, places.numbers, statuses=tuple(map(_PUT_STATUSES, payload[:n]))
                )
            case Grant():
                return _decode_places(n, payload, checksums=False)
            case Lease():
                loaded_at = len(payload) - 8 if frame.flags & ReplyFlag.LOADED else len(payload)
                places = _decode_places(n, payload[:loaded_at], checksums=bool(frame.flags & Flag.CHECKSUMS))
                if not frame.flags & ReplyFlag.LOADED:
                    return places
                return msgspec.structs.replace(places, num_loaded=int.from_bytes(payload[loaded_at:], "little"))
            case Commit() | Name():
                return tuple(map(_COMMIT_STATUSES, payload))
            case _:
                return tuple(map(bool, payload))
    except (ValueError, IndexError, struct.error) as error:
        raise ProtocolError(f"reply of {len(payload)} bytes does not answer {type(event).__name__}: {error}") from error


def _num_items(event: Request) -> int:
    match event:
        case Reserve() | Lease() | Exists() | Remove() | Name():
            return len(event.keys)
        case Grant():
            return len(event.sizes)
        case Commit() | Cancel() | Release():
            return len(event.numbers)
    raise TypeError(f"not a request: {event!r}")


def _encode_places(places: Places) -> bytes:
    """Number 0: nowhere."""
    values = (*places.offsets, *places.sizes, *places.numbers)
    return _u64s(values if None not in values else tuple([value or 0 for value in values]))  # type: ignore[arg-type]


def _encode_checksums(checksums: tuple[int | None, ...]) -> bytes:
    """Each a byte that says whether there is one; then the numbers."""
    if None not in checksums:
        return b"\1" * len(checksums) + _u64s(checksums)  # type: ignore[arg-type]
    known = bytes([checksum is not None for checksum in checksums])
    return known + _u64s(tuple([checksum or 0 for checksum in checksums]))


def _decode_checksums(n: int, data: bytes) -> tuple[int | None, ...]:
    known, values = data[:n], struct.unpack(f"<{n}Q", data[n:])
    if known.count(1) == n:
        return values
    return tuple([value if is_known else None for is_known, value in zip(known, values, strict=True)])


def _decode_places(n: int, data: bytes, *, checksums: bool) -> Places:
    sums: tuple[int | None, ...] = ()
    if checksums:
        sums, data = _decode_checksums(n, data[24 * n :]), data[: 24 * n]
    values = struct.unpack(f"<{3 * n}Q", data)
    columns: list[tuple[int | None, ...]] = [values[:n], values[n : 2 * n], values[2 * n :]]
    if 0 in columns[2]:
        columns = [
            tuple([value if number else None for value, number in zip(column, columns[2], strict=True)])
            for column in columns
        ]
    offsets, sizes, numbers = columns
    return Places(offsets, sizes, numbers, sums)


# ---------------------------------------------------------------- errors

_CODES: tuple[tuple[type[StoreError], ErrorCode], ...] = (
    (AuthError, ErrorCode.AUTH),
    (ProtocolError, ErrorCode.PROTOCOL),
    (BadArgument, ErrorCode.BAD_ARGUMENT),
    (StoreUnavailable, ErrorCode.UNAVAILABLE),
)


def encode_error(error: StoreError, request_id: int = 0) -> bytes:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), ErrorCode.PROTOCOL)
    return pack_error(code, str(error), request_id)


def decode_error(frame: Frame) -> StoreError:
    kind = next((kind for kind, code in _CODES if code == frame.count), ProtocolError)
    return kind(frame.payload.decode(errors="replace"))


def is_error(frame: Frame) -> bool:
    return frame.kind == Kind.ERROR


def _u64s(values: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def _expect_length(frame: Frame, length: int) -> None:
    if len(frame.payload) != length:
        raise ProtocolError(f"{frame.count} items of kind {frame.kind} need {length} bytes, got {len(frame.payload)}")


def _decode_struct(frame: Frame, kind: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(frame.payload, type=kind)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"bad {kind.__name__} frame: {error}") from error
