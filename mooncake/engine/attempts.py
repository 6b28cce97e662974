"""What the prefill and the decode core have in common: the table of attempts, and the events and commands of their shells.

Both cores talk to three sides: frontends and the Conductor by messages, the store by `OpenSource` and its like, the engine by
`RunSequence` and `AbortSequence`, which answers with `EngineProgress`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from mooncake.core.messages import AnyMessage, Send, StepTokens, TokenOutput
from mooncake.core.types import AttemptKey, Job, KvSource, Role
from mooncake.engine.core import Drawn, EngineLoad, ServiceOutput

# ---------------------------------------------------------------- events


class Received(msgspec.Struct, frozen=True, tag=True):
    sender: str
    message: AnyMessage


class PeerOpened(msgspec.Struct, frozen=True, tag=True):
    """A connection to that peer is there (again)."""

    peer: str


class PeerGone(msgspec.Struct, frozen=True, tag=True):
    """The connection to that peer broke; what it wanted is not wanted any more."""

    peer: str


class SourceOpened(msgspec.Struct, frozen=True, tag=True):
    """Answer to `OpenSource`: the leading num_tokens tokens are leased and can be read. 0: nothing is, and nothing is held."""

    seq: int
    num_tokens: int


class EngineProgress(msgspec.Struct, frozen=True, tag=True):
    """What the engine did since the last one, at most once a step."""

    outputs: tuple[ServiceOutput, ...]
    load: EngineLoad
    step_ns: int = 0
    """0: no step was run."""
    blocks_added: tuple[bytes, ...] = ()
    blocks_removed: tuple[bytes, ...] = ()
    cached: tuple[bytes, ...] | None = None
    """Keys of all cached blocks, when they were asked for (`ListBlocks`)."""


class KvStored(msgspec.Struct, frozen=True, tag=True):
    """The sequence's sink has tokens [start, end). Told by the engine as soon as it is so, never after `SequenceReleased`."""

    seq: int
    start: int
    end: int


class Tick(msgspec.Struct, frozen=True, tag=True):
    """The time of `deadline()` has come."""


# ---------------------------------------------------------------- commands


class OpenSource(msgspec.Struct, frozen=True):
    """Lease the source's objects at its node, for that tenant. Answered by `SourceOpened`."""

    seq: int
    source: KvSource
    tenant: str = ""


class CloseSource(msgspec.Struct, frozen=True):
    """Release the leases of the sequence's source."""

    seq: int


class RunSequence(msgspec.Struct, frozen=True):
    """Submit to the engine, with its turn among others (`mooncake.engine.fair_queue`). Its last output for the sequence is
    `SequenceReleased`."""

    seq: int
    job: Job
    source_tokens: int
    one_token: bool = False
    store: bool = False
    turn: int = 0


class LoadBlocks(msgspec.Struct, frozen=True):
    """Have the engine load these leading blocks of a sequence to come from the open source of that number, if those up to token
    `start` are still there. Its output for the number is `AheadEnded`."""

    seq: int
    block_keys: tuple[bytes, ...]
    start: int


class AbortSequence(msgspec.Struct, frozen=True):
    seq: int


class ListBlocks(msgspec.Struct, frozen=True):
    """Have the engine tell which blocks it has cached."""


class TakeRole(msgspec.Struct, frozen=True):
    """Nothing is left to do in this role. Go on in that one: with a core of its own and a new epoch, on the same engine."""

    role: Role


# ---------------------------------------------------------------- the table


class Attempt:
    """One job and its number in the engine; the cores add their own state."""

    __slots__ = ("deadline", "job", "key", "received_at", "seq", "started_at")

    def __init__(self, seq: int, job: Job, now: int) -> None:
        self.seq = seq
        self.job = job
        self.key = job.key
        self.received_at = now
        self.started_at = now
        self.deadline = now + job.deadline_ns

    def token_output(self, drawn: Drawn, now: int) -> TokenOutput:
        return TokenOutput(
            self.key.of_choice(drawn.choice),
            drawn.position,
            drawn.token_ids,
            drawn.finish,
            drawn.logprobs,
            drawn.cached_tokens,
            compute_ns=None if drawn.cached_tokens is None else now - self.started_at,
        )


A = TypeVar("A", bound=Attempt)


class AttemptTable(Generic[A]):
    """Attempts by key and by sequence number, and the next deadline. A bounded table: `full` says so."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_key: dict[AttemptKey, A] = {}
        self._by_seq: dict[int, A] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._next_seq = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[A]:
        return iter(self._by_key.values())

    @property
    def full(self) -> bool:
        return len(self._by_key) >= self._capacity

    def new_seq(self) -> int:
        self._next_seq += 1
        return self._next_seq

    def add(self, attempt: A) -> None:
        self._by_key[attempt.key] = attempt
        self._by_seq[attempt.seq] = attempt
        heapq.heappush(self._deadlines, (attempt.deadline, attempt.seq))

    def by_key(self, key: AttemptKey) -> A | None:
        return self._by_key.get(key)

    def by_seq(self, seq: int) -> A | None:
        return self._by_seq.get(seq)

    def remove(self, attempt: A) -> None:
        del self._by_key[attempt.key]
        del self._by_seq[attempt.seq]

    def of_frontend(self, frontend: str) -> list[A]:
        return [a for a in self._by_key.values() if a.key.frontend == frontend]

    def unwanted(self, frontend: str, wanted: Iterable[AttemptKey], received_before: int) -> list[A]:
        keep = frozenset(wanted)
        return [a for a in self.of_frontend(frontend) if a.key not in keep and a.received_at < received_before]

    def next_deadline(self) -> int | None:
        while self._deadlines and self._deadlines[0][1] not in self._by_seq:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expired(self, now: int) -> list[A]:
        """Attempts whose deadline has passed, each returned once."""
        out: list[A] = []
        while (first := self.next_deadline()) is not None and first <= now:
            out.append(self._by_seq[heapq.heappop(self._deadlines)[1]])
        return out


def group_tokens(instance: str, outputs: Iterable[TokenOutput]) -> list[Send]:
    """One message per frontend with all its tokens of this step."""
    by_frontend: dict[str, list[TokenOutput]] = {}
    for output in outputs:
        by_frontend.setdefault(output.key.frontend, []).append(output)
    return [Send(frontend, StepTokens(instance, tuple(group))) for frontend, group in by_frontend.items()]
