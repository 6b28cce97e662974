"""How a client reaches the memory of a node that has welcomed it."""

from __future__ import annotations

import contextlib
import socket

import msgspec

from mooncake.core.errors import SegmentError
from mooncake.store import wire
from mooncake.store.handles import Link
from mooncake.store.local.reader import LocalReader
from mooncake.transport.base import Region
from mooncake.transport.shm import ShmPath, open_segment
from mooncake.transport.tcp import TIMEOUT_S, TcpPath, parse_address


def open_link(address: str, hello: wire.Hello, welcome: wire.Welcome, stall_s: float = TIMEOUT_S) -> Link:
    """The segment itself where it can be mapped, else the socket that leads to it. A link with a local reader may be used when
    its table is attached. stall_s: how long a socket may be without progress. Blocks while the pages are mapped."""
    family, _ = parse_address(address)
    if family == socket.AF_UNIX:
        with contextlib.suppress(SegmentError):
            segment = open_segment(Region("shm", welcome.segment, welcome.capacity), welcome.epoch)
            return Link(segment, _local_reader(segment, welcome), charges_tenants=welcome.charges_tenants)
    greeting = msgspec.structs.replace(hello, session=welcome.session)
    region = Region("tcp", address, welcome.capacity)
    path = TcpPath(region, wire.encode_hello(greeting), timeout_s=stall_s)
    return Link(path, charges_tenants=welcome.charges_tenants)


def _local_reader(path: ShmPath, welcome: wire.Welcome) -> LocalReader | None:
    """None where there is no index, or no room for a table: then the node is asked."""
    if welcome.num_entries:
        with contextlib.suppress(SegmentError):
            return LocalReader(path, welcome.epoch, welcome.num_entries)
    return None
