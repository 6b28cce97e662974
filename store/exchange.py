"""A client's end of a control connection without the socket: requests become bytes, bytes become answers.

Answers come in any order and are matched by number. One that nobody waits for any more is undone: what it gave is given back.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import msgspec

from mooncake.core.errors import ProtocolError, StoreError, StoreUnavailable
from mooncake.store import wire
from mooncake.store.events import Cancel, Commit, Grant, Release, Request, Results
from mooncake.store.types import CommitStatus, Places, Puts, PutStatus
from mooncake.transport.frames import Frame, FrameReader, Kind, pack

MAX_PENDING = 4096
"""Requests without an answer; a node that is so far behind is as good as gone."""


class Answer(NamedTuple):
    """outcome: what the request's type says, an error, or None for an ATTACH or SYNC that went well."""

    number: int
    outcome: Results | StoreError | None


class Exchange:
    def __init__(self) -> None:
        self._reader = FrameReader(wire.MAX_CONTROL_BYTES)
        self._pending: dict[int, Request | None] = {}
        self._abandoned: dict[int, None] = {}
        self._numbers = itertools.count(1)

    def ask(self, request: Request) -> tuple[int, bytes]:
        """The number that its answer will have, and what to send. Raises StoreUnavailable."""
        number = self._next_number()
        self._pending[number] = request
        return number, wire.encode_request(msgspec.structs.replace(request, request_id=number))

    def attach(self, table: str) -> tuple[int, bytes]:
        number = self._next_number()
        self._pending[number] = None
        return number, pack(wire.Op.ATTACH, table.encode(), request=number)

    def sync(self) -> tuple[int, bytes]:
        number = self._next_number()
        self._pending[number] = None
        return number, pack(wire.Op.SYNC, request=number)

    def abandon(self, number: int) -> None:
        """Nobody waits for this one any more."""
        if number in self._pending:
            self._abandoned[number] = None

    def receive(self, data: bytes) -> tuple[list[Answer], bytes]:
        """Answers, and what to send: it takes back what abandoned requests were given. Raises StoreError: the connection is
        of no use any more."""
        answers: list[Answer] = []
        undoing: list[bytes] = []
        for frame in self._reader.feed(data):
            number = frame.request
            if number not in self._pending:
                raise (
                    wire.decode_error(frame)
                    if wire.is_error(frame)
                    else ProtocolError(f"answer to request {number}, which is not waiting for one")
                )
            request = self._pending.pop(number)
            outcome = _outcome(request, frame)
            if number not in self._abandoned:
                answers.append(Answer(number, outcome))
                continue
            del self._abandoned[number]
            if request is not None and not isinstance(outcome, StoreError) and outcome is not None:
                for follow_up in undo(request, outcome):
                    again, asked = self.ask(follow_up)
                    self._abandoned[again] = None
                    undoing.append(asked)
        return answers, b"".join(undoing)

    def _next_number(self) -> int:
        if len(self._pending) >= MAX_PENDING:
            raise StoreUnavailable(f"{MAX_PENDING} requests wait for an answer")
        return next(self._numbers) & 0xFFFFFFFF


def _outcome(request: Request | None, frame: Frame) -> Results | StoreError | None:
    if wire.is_error(frame):
        return wire.decode_error(frame)
    if request is not None:
        return wire.decode_reply(request, frame)
    if frame.kind != Kind.OK:
        raise ProtocolError(f"ATTACH and SYNC must be answered by OK, got kind {frame.kind}")
    return None


def undo(request: Request, results: Results) -> list[Request]:
    """What takes back a call whose caller did not wait for its results."""
    reserved: tuple[int, ...] = ()
    leased: tuple[int, ...] = ()
    match results:
        case Puts():
            pairs = list(zip(results.numbers, results.statuses, strict=True))
            reserved = tuple([number for number, status in pairs if number and status is PutStatus.RESERVED])
            leased = tuple([number for number, status in pairs if number and status is PutStatus.EXISTS])
        case Places() if isinstance(request, Grant):
            reserved = tuple([number for number in results.numbers if number])
        case Places():
            leased = tuple([number for number in results.numbers if number])
        case _ if isinstance(request, Commit) and request.lease:
            there = (CommitStatus.COMMITTED, CommitStatus.EXISTS)
            leased = tuple([number for number, status in zip(request.numbers, results, strict=True) if status in there])
    undone: list[Request] = []
    if reserved:
        undone.append(Cancel(0, 0, reserved))
    if leased:
        undone.append(Release(0, 0, leased))
    return undone
