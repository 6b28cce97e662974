"""Event logs of a live cluster, read back: the same core, told the same, must say the same; then it can be asked what it holds.

That is how these tests see inside processes that offer no way in: a leak is a booking, an attempt, a page or a lease that a
core still has at a time when nothing runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mooncake.core.event_log import encode_commands, read_log
from mooncake.core.types import Job
from mooncake.decode.core import DecodeCore, DecodeEvent
from mooncake.decode.service import DecodeSettings
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.core import EngineLoad
from mooncake.frontend.service import DispatcherSettings
from mooncake.prefill.core import PrefillCore, PrefillEvent
from mooncake.prefill.service import PrefillSettings, attempt_partial_key
from mooncake.scheduler import core as conductor
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.dispatcher import Dispatcher, DispatcherEvent, Ended, hashed_keys
from mooncake.store import events as store
from mooncake.store.core import StoreCore
from mooncake.store.service import StoreSettings

_StoreEvent = (
    store.Reserve
    | store.Commit
    | store.Cancel
    | store.Lease
    | store.Release
    | store.Exists
    | store.Remove
    | store.ClientGone
    | store.SnapshotWanted
    | store.Tick
)


def _refusal(max_tokens: int) -> Callable[[Job], str | None]:
    def refuse(job: Job) -> str | None:
        if job.num_tokens < max_tokens:
            return None
        return f"{job.num_tokens} tokens do not fit: a sequence holds at most {max_tokens} here"

    return refuse


def _conductor(settings: ConductorConfig, seed: int) -> Any:
    return conductor.ConductorCore(settings, random.Random(seed))


def _prefill(settings: PrefillSettings, seed: int) -> Any:
    refusal = _refusal(settings.max_tokens)
    return PrefillCore(settings.info, settings.limits, settings.block_tokens, attempt_partial_key, refusal)


def _decode(settings: DecodeSettings, seed: int) -> Any:
    return DecodeCore(settings.info, settings.max_queued, _refusal(settings.max_tokens))


def _frontend(settings: DispatcherSettings, seed: int) -> Any:
    return Dispatcher(settings.name, settings.limits, hashed_keys(settings.block_tokens))


def _store(settings: StoreSettings, seed: int) -> Any:
    return StoreCore(settings.capacity_bytes, epoch=settings.epoch, alignment=settings.alignment)


_CORES: dict[str, tuple[Any, Any, Callable[[Any, int], Any]]] = {
    "conductor": (ConductorConfig, conductor.Received | conductor.PeerGone | conductor.Tick, _conductor),
    "prefill": (PrefillSettings, PrefillEvent, _prefill),
    "decode": (DecodeSettings, DecodeEvent, _decode),
    "frontend": (DispatcherSettings, DispatcherEvent, _frontend),
    "store": (StoreSettings, _StoreEvent, _store),
}


class Replayed:
    """One life of one process. load: the engine's last report; ended: the requests that a frontend saw out."""

    def __init__(self, core: Any, role: str) -> None:
        self.core = core
        self.role = role
        self.load: EngineLoad | None = None
        self.ended: list[Ended] = []
        self.num_events = 0

    def leftovers(self) -> str:
        """What it still has, in words; empty when it has nothing."""
        found: dict[str, object] = {}
        match self.role:
            case "conductor":
                found = {"bookings": list(self.core.books.bookings)}
            case "prefill" | "decode":
                found = {"attempts": self.core.num_attempts}
                if self.load is not None:
                    used = self.core.reporter.info.num_pages - self.load.free_pages
                    found |= {"pages": used, "running": self.load.num_running, "waiting": self.load.num_waiting}
            case "frontend":
                found = {"requests": self.core.num_running}
            case "store":
                metrics = self.core.metrics()
                found = {name: metrics[name] for name in ("reservations", "leases")}
        return ", ".join(f"{name}: {value}" for name, value in found.items() if value)


def replay(path: Path, until_ns: int | None = None) -> Replayed | None:
    """The core as it was at that time, or at the end. None if it did not live yet. Asserts that it answers as it did live."""
    with path.open("rb") as file:
        header, entries = read_log(file)
        settings_type, event_type, make = _CORES[header.core]
        found = Replayed(make(msgspec.convert(header.settings, settings_type), header.seed), header.core)
        decode = msgspec.msgpack.Decoder(event_type).decode
        for entry in entries:
            if until_ns is not None and entry.now > until_ns:
                break
            event = decode(entry.event)
            commands = found.core.handle(event, entry.now)
            assert encode_commands(commands) == entry.commands, f"{path.name}: event {found.num_events}: {event}"
            found.num_events += 1
            if isinstance(event, EngineProgress):
                found.load = event.load
            found.ended += [command for command in commands if isinstance(command, Ended)]
    found.core.check_integrity()
    return found if found.num_events else None
