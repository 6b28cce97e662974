"""Event logs of live cores, read back: the same core, told the same, must say the same. So an incident becomes a test file.

A log says which core wrote it and from what it was built (`mooncake.core.event_log`). Here it is built again, told every event
at its time, and must answer byte for byte as it did. Then it can be asked what it holds: a booking, an attempt, a page or a
lease at a time when nothing runs is a leak.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from mooncake.core.errors import EventLogError, ReplayMismatch
from mooncake.core.event_log import LogEntry, LogHeader, encode_commands, read_log
from mooncake.core.messages import Placed, Rejected, Send
from mooncake.core.types import InstanceInfo, Job
from mooncake.decode.core import DecodeCore, DecodeEvent
from mooncake.decode.service import DecodeSettings
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.base import EngineLimits
from mooncake.engine.core import EngineCore, EngineLoad
from mooncake.prefill.core import PrefillCore, PrefillEvent
from mooncake.prefill.service import PrefillSettings, attempt_partial_key
from mooncake.scheduler import core as conductor
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.dispatcher import Dispatcher, DispatcherEvent, DispatcherSettings, Ended, hashed_keys
from mooncake.store import events as store
from mooncake.store.core import StoreCore
from mooncake.store.eviction import POLICIES
from mooncake.store.readers import Answers, RecordedReaders
from mooncake.store.service import StoreSettings

_BRIEF_CHARS = 300
"""Of an event or a value in a message: a snapshot has thousands of keys."""

_ConductorEvent = conductor.Received | conductor.PeerGone | conductor.Tick
_StoreEvent = (
    store.Reserve
    | store.Commit
    | store.Grant
    | store.Name
    | store.Cancel
    | store.Lease
    | store.Release
    | store.Exists
    | store.Remove
    | store.ClientTenant
    | store.UsedElsewhere
    | store.ClientGone
    | store.Used
    | store.Flush
    | store.Adopted
    | store.SnapshotWanted
    | store.SsdWritten
    | store.SsdRead
    | store.SsdRecovered
    | store.Tick
)

# ---------------------------------------------------------------- the cores


class _Kind(msgspec.Struct, frozen=True):
    """settings, events: the types in a log of such a core. build: it, from settings and seed. held: what it holds now."""

    settings: Any
    events: Any
    build: Callable[[Any, int], Any]
    held: Callable[[Any], dict[str, int]]


def _conductor(settings: ConductorConfig, seed: int) -> conductor.ConductorCore:
    return conductor.ConductorCore(settings, random.Random(seed))


def _prefill(settings: PrefillSettings, seed: int) -> PrefillCore:
    refusal = _refusal(settings.info, settings.max_tokens)
    return PrefillCore(settings.info, settings.limits, settings.block_tokens, attempt_partial_key, refusal)


def _decode(settings: DecodeSettings, seed: int) -> DecodeCore:
    return DecodeCore(settings.info, settings.max_queued, _refusal(settings.info, settings.max_tokens))


def _frontend(settings: DispatcherSettings, seed: int) -> Dispatcher:
    return Dispatcher(settings.name, settings.limits, hashed_keys(settings.block_tokens))


def _store(settings: StoreSettings, seed: int) -> StoreCore:
    return StoreCore(
        settings.capacity_bytes,
        epoch=settings.epoch,
        alignment=settings.alignment,
        policy=POLICIES[settings.eviction](),
        ssd=settings.ssd,
        readers=RecordedReaders(),
        last_number=settings.epoch,
        quotas=settings.quotas,
    )


def _refusal(info: InstanceInfo, max_tokens: int) -> Callable[[Job], str | None]:
    """What the instance's engine could never run, in its own words."""
    limits = EngineLimits(
        info.num_pages, info.page_tokens, info.page_tokens, info.max_batch, info.max_step_tokens, max_tokens
    )
    return EngineCore(limits, overlap_loads=False).refusal


def _claims(core: StoreCore) -> dict[str, int]:
    metrics = core.metrics()
    return {name: metrics[name] for name in ("reservations", "leases")}


def _attempts(core: PrefillCore) -> dict[str, int]:
    return {"attempts": core.num_attempts}


def _attempts_and_loads(core: DecodeCore) -> dict[str, int]:
    return {"attempts": core.num_attempts, "loads ahead": core.num_ahead}


_KINDS = {
    "conductor": _Kind(
        ConductorConfig, _ConductorEvent, _conductor, lambda core: {"bookings": len(core.books.bookings)}
    ),
    "prefill": _Kind(PrefillSettings, PrefillEvent, _prefill, _attempts),
    "decode": _Kind(DecodeSettings, DecodeEvent, _decode, _attempts_and_loads),
    "frontend": _Kind(DispatcherSettings, DispatcherEvent, _frontend, lambda core: {"requests": core.num_running}),
    "store": _Kind(StoreSettings, _StoreEvent, _store, _claims),
}


# ---------------------------------------------------------------- replay


class Replayed:
    """One life of one process. kind: conductor, prefill, decode, frontend or store. load: its engine's last report. ended: the
    requests that it saw out, if it is a frontend."""

    def __init__(self, header: LogHeader) -> None:
        """Raises ValueError if this program has no such core, or one with other settings."""
        kind = _KINDS.get(header.core)
        if kind is None:
            raise ValueError(f"of a core {header.core!r}, which is not known here")
        self.kind = header.core
        self.core = kind.build(msgspec.convert(header.settings, kind.settings), header.seed)
        self.num_events = 0
        self.load: EngineLoad | None = None
        self.ended: list[Ended] = []

    def tell(self, event: Any, now: int, answers: Answers = ()) -> list[Any]:
        """answers: what it was told by those it asked meanwhile, if it is a store."""
        if isinstance(self.core, StoreCore) and isinstance(self.core.readers, RecordedReaders):
            self.core.readers.begin(answers)
        commands: list[Any] = self.core.handle(event, now)
        self.num_events += 1
        if isinstance(event, EngineProgress):
            self.load = event.load
        self.ended += [command for command in commands if isinstance(command, Ended)]
        return commands

    def leftovers(self) -> dict[str, int]:
        """What it holds now; empty if nothing."""
        held = _KINDS[self.kind].held(self.core)
        if self.load is not None:
            num_pages = self.core.reporter.info.num_pages
            held["pages"] = num_pages - self.load.free_pages
            held["running"], held["waiting"] = self.load.num_running, self.load.num_waiting
        return {what: count for what, count in held.items() if count}


OnTold = Callable[[Replayed, list[Any]], None]
"""Gets the commands of an event."""


def replay_log(path: Path, until_ns: int | None = None, on_told: OnTold | None = None) -> Replayed:
    """The core as it was at that time of its own clock, or at the end. on_told: called after every event. Raises EventLogError
    for a file that is no log, ReplayMismatch where the core does not answer as it did."""
    with _readable(str(path)):
        file = path.open("rb")
    with file:
        with _readable(str(path)):
            header, entries = read_log(file)
            replayed = Replayed(header)
        for entry, event in _events(str(path), entries, _KINDS[header.core].events):
            if until_ns is not None and entry.now > until_ns:
                break
            commands = _compare(f"{path}: event {replayed.num_events}, {_brief(event)}", replayed, entry, event)
            if on_told is not None:
                on_told(replayed, commands)
    try:
        replayed.core.check_integrity()
    except AssertionError as error:
        raise ReplayMismatch(f"{path}: after {replayed.num_events} events: {error}") from error
    return replayed


def explain_log(path: Path, request: str, num_last: int) -> list[str]:
    """The decision records behind the last placements in a Conductor's log, of one request (frontend/number) or, if that is
    empty, of any. Raises as `replay_log`, and EventLogError for another core's log."""
    explained: deque[str] = deque(maxlen=num_last)

    def told(replayed: Replayed, commands: list[Any]) -> None:
        for command in commands:
            if not isinstance(command, Send) or not isinstance(command.message, Placed | Rejected):
                continue
            key = command.message.key
            text = replayed.core.explain(key) if request in ("", f"{key.frontend}/{key.request}") else None
            if text is not None:  # it has none if nobody could be chosen from
                explained.append(text)

    replayed = replay_log(path, on_told=told)
    if replayed.kind != "conductor":
        raise EventLogError(f"{path}: the log of a {replayed.kind}; the Conductor's has the placements")
    return list(explained)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EventLogError(f"{where}: {error.strerror}") from error
    except ValueError as error:
        raise EventLogError(f"{where}: {error}") from error


def _events(path: str, entries: Iterator[LogEntry], events: Any) -> Iterator[tuple[LogEntry, Any]]:
    decode = msgspec.msgpack.Decoder(events).decode
    for number in itertools.count():
        with _readable(f"{path}: event {number}"):
            entry = next(entries, None)
            if entry is None:
                return
            event = decode(entry.event)
        yield entry, event


def _compare(where: str, replayed: Replayed, entry: LogEntry, event: Any) -> list[Any]:
    """Tells it the event; its commands, which must be those of the log."""
    try:
        told = replayed.tell(event, entry.now, entry.answers)
        commands = encode_commands(told)
    except Exception as error:  # an event that is in a log was handled when it was written
        raise ReplayMismatch(f"{where}: {type(error).__name__}: {error}") from error
    if commands != entry.commands:
        with _readable(where):
            difference = _first_difference(entry.commands, commands)
        raise ReplayMismatch(f"{where}: {difference}")
    return told


# ---------------------------------------------------------------- what differs


def _first_difference(logged: bytes, now: bytes) -> str:
    """Which command, down to the field."""
    decode = msgspec.msgpack.Decoder(list[tuple[str, Any]]).decode
    pairs = itertools.zip_longest(decode(logged), decode(now))
    number, one, other = next((at, one, other) for at, (one, other) in enumerate(pairs) if _differ(one, other))
    where = f"command {number}"
    if one and other and one[0] == other[0]:
        where, one, other = _innermost(f"{where}, {one[0]}", one[1], other[1])
    return f"{where}: {_brief(one)} in the log, {_brief(other)} now"


def _innermost(where: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """The first values that differ, and where they are; one and other do."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{where}.{key}", value, other[key]) for key, value in one.items()]
    elif isinstance(one, list) and isinstance(other, list):
        pairs = [(f"{where}[{at}]", *both) for at, both in enumerate(itertools.zip_longest(one, other))]
    else:
        return where, one, other
    return next((_innermost(*inner) for inner in pairs if _differ(inner[1], inner[2])), (where, one, other))


def _differ(one: Any, other: Any) -> bool:
    """As bytes do: 1 is not 1.0, and a NaN is like another."""
    return msgspec.msgpack.encode(one) != msgspec.msgpack.encode(other)


def _brief(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _BRIEF_CHARS else f"{text[:_BRIEF_CHARS]}..."
