"""Many buffers through a blocking stream socket, without a copy and with few system calls."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from mooncake.core.errors import PathLost

_MAX_BUFFERS = 1024  # of one system call: IOV_MAX


def limit_time(stream: socket.socket, timeout_s: float) -> None:
    """Without progress. The kernel's limits on a blocking socket: Python's own would add a poll to every call."""
    timeout = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        stream.setsockopt(socket.SOL_SOCKET, option, timeout)


def connect(family: int, target: str | tuple[str, int], timeout_s: float) -> socket.socket:
    """A blocking stream to an address of parse_address(), each call limited as by limit_time(). Raises OSError."""
    stream = socket.socket(family, socket.SOCK_STREAM)
    try:
        limit_time(stream, timeout_s)
        if family != socket.AF_UNIX:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.connect(target)
    except BaseException:
        stream.close()
        raise
    return stream


def has_ended(stream: socket.socket) -> bool:
    """Whether the peer has closed it and all that it sent was received, or it broke."""
    try:
        return not stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def send(stream: socket.socket, buffers: Sequence[memoryview | bytes]) -> None:
    """All of them. Raises OSError."""
    for first in range(0, len(buffers), _MAX_BUFFERS):
        some = buffers[first : first + _MAX_BUFFERS]
        num_sent = stream.sendmsg(some)
        for rest in _rests(some, num_sent):
            stream.sendall(rest)


def receive(stream: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill all of them. Raises OSError, or PathLost if the peer ends the stream before."""
    for first in range(0, len(buffers), _MAX_BUFFERS):
        some = buffers[first : first + _MAX_BUFFERS]
        num_received, _, _, _ = stream.recvmsg_into(some, 0, socket.MSG_WAITALL)
        for rest in _rests(some, num_received):
            while rest.nbytes:
                num_more = stream.recv_into(rest, 0, socket.MSG_WAITALL)
                if not num_more:
                    raise PathLost("the peer closed the connection")
                rest = rest[num_more:]


def _rests(buffers: Sequence[memoryview | bytes], num_done: int) -> list[memoryview]:
    """What is left of the buffers when so many bytes are through: nothing, as a rule."""
    rests: list[memoryview] = []
    for buffer in buffers:
        size = len(buffer)
        if num_done < size:
            rests.append(memoryview(buffer)[num_done:])
        num_done = max(0, num_done - size)
    return rests
