"""Event logs: what a core did is what it does again, and whatever differs is named."""

from __future__ import annotations

import random
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake.core.errors import EventLogError, ReplayMismatch
from mooncake.core.event_log import LOG_VERSION, EventLogWriter, LogEntry, LogHeader, encode_commands, read_log
from mooncake.core.messages import (
    CONDUCTOR,
    Abort,
    AttemptFailed,
    Placed,
    Prediction,
    Send,
    StepTokens,
    Submit,
    TokenOutput,
)
from mooncake.core.types import NANOS_PER_S, FinishReason, Role, SamplingParams, tokens_to_bytes
from mooncake.decode.service import DecodeSettings
from mooncake.engine.attempts import KvStored, PeerOpened, Received, SourceOpened, Tick
from mooncake.engine.base import EngineLimits
from mooncake.engine.core import Drawn, EngineCore, SequenceReleased
from mooncake.prefill.core import KvCommitted, KvReserved, PrefillCore, PrefillLimits, ReleaseKv
from mooncake.prefill.service import PrefillSettings, attempt_partial_key
from mooncake.scheduler import dispatcher
from mooncake.scheduler.dispatcher import Dispatcher, DispatcherLimits, DispatcherSettings, hashed_keys
from mooncake.sim.cluster import ClusterConfig, SimCluster
from mooncake.sim.replay_log import explain_log, replay_log
from mooncake.store.core import StoreCore
from mooncake.store.events import ClientGone, ClientTenant, Commit, Flush, Lease, Reserve, Usage, UsedElsewhere
from mooncake.store.service import StoreSettings
from tests.engine.jobs import key, make_info, make_job, progress
from tests.sim.workload import LOSSY, requests

MS = 1_000_000
SEED = 5
STORE = StoreSettings(1 << 16, 7, 4096)
OBJECTS = (b"a" * 24, b"b" * 24)
STORE_EVENTS = (Reserve(1, 1, OBJECTS, (100, 5000)), Commit(1, 2, (8, 9)), Lease(2, 1, OBJECTS), ClientGone(2))


def record(path: Path, kind: str, settings: Any, core: Any, events: Iterable[Any]) -> list[Any]:
    """What a live process with that core would write, one event a millisecond. Gives all commands."""
    writer = EventLogWriter(path.open("wb", buffering=0), kind, 0, settings)
    given: list[Any] = []
    for number, event in enumerate(events):
        commands = core.handle(event, number * MS)
        writer.append(number * MS, event, commands)
        given += commands
    writer.close()
    return given


def store_log(path: Path, events: Iterable[Any] = STORE_EVENTS) -> Path:
    core = StoreCore(STORE.capacity_bytes, epoch=STORE.epoch, alignment=STORE.alignment, last_number=STORE.epoch)
    record(path, "store", STORE, core, events)
    return path


def frames(path: Path) -> tuple[LogHeader, list[LogEntry]]:
    header, entries = read_log(BytesIO(path.read_bytes()))
    return header, list(entries)


def write(path: Path, header: Any, entries: Iterable[Any]) -> None:
    data = map(msgspec.msgpack.encode, (header, *entries))
    path.write_bytes(b"".join(len(frame).to_bytes(4, "little") + frame for frame in data))


def refused(path: Path) -> str:
    with pytest.raises(EventLogError) as found:
        replay_log(path)
    return str(found.value).removeprefix(f"{path}: ")


def differs(path: Path) -> str:
    with pytest.raises(ReplayMismatch) as found:
        replay_log(path)
    return str(found.value).removeprefix(f"{path}: ")


# ---------------------------------------------------------------- the same again


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Logs of the simulated processes that are built as live ones are, by name; all is over at their end."""
    config = ClusterConfig(prefill=1, decode=1, nodes=1, network=LOSSY)
    limits = config.limits
    longest = min(limits.max_context, limits.num_pages * limits.page_tokens)
    kinds: dict[str, tuple[str, Any]] = {
        "conductor": ("conductor", lambda core: config.conductor),
        "decode-0": ("decode", lambda core: DecodeSettings(core.reporter.info, 1024, longest)),
    }
    folder = tmp_path_factory.mktemp("logs")
    # The cluster draws its Conductor's seed first of all.
    seed = random.Random(SEED).randrange(1 << 32)
    writers: dict[str, EventLogWriter] = {}

    def watch(now: int, name: str, core: Any, event: Any, commands: list[Any]) -> None:
        if name not in kinds:
            return
        if name not in writers:
            kind, settings = kinds[name]
            writers[name] = EventLogWriter((folder / name).open("wb"), kind, seed, settings(core))
        writers[name].append(now, event, commands)

    cluster = SimCluster(config, SEED, watch)
    cluster.submit(requests(random.Random(SEED), 80, 2 * NANOS_PER_S))
    cluster.run(600 * NANOS_PER_S)
    cluster.settle(25 * NANOS_PER_S)
    for writer in writers.values():
        writer.close()
    return {name: folder / name for name in kinds}


@pytest.mark.parametrize("name", ["conductor", "decode-0"])
def test_a_simulated_core_does_the_same_again_and_holds_nothing_at_the_end(
    simulated: dict[str, Path], name: str
) -> None:
    replayed = replay_log(simulated[name])
    assert replayed.num_events == len(frames(simulated[name])[1]) > 200
    assert replayed.leftovers() == {}


def test_placements_of_a_log_can_be_explained(simulated: dict[str, Path]) -> None:
    found = explain_log(simulated["conductor"], "", 1000)
    assert len(found) >= 80
    assert all(" placed by " in text and "-> decode " in text for text in found)
    assert all("-> prefill " in text for text in found if "/0 placed by " in text), "a further attempt may only decode"
    assert explain_log(simulated["conductor"], "", 3) == found[-3:]
    first = found[0].split("/0/0 ")[0]
    assert [text for text in found if text.startswith(f"{first}/")] == explain_log(simulated["conductor"], first, 1000)
    assert explain_log(simulated["conductor"], "frontend-9/1", 10) == []
    with pytest.raises(EventLogError, match="the log of a decode; the Conductor's has the placements"):
        explain_log(simulated["decode-0"], "", 10)


@pytest.mark.parametrize(("name", "what"), [("conductor", "bookings"), ("decode-0", "pages")])
def test_what_a_core_held_can_be_asked_of_any_time(simulated: dict[str, Path], name: str, what: str) -> None:
    found = [replay_log(simulated[name], at * NANOS_PER_S // 10) for at in range(-1, 20)]
    assert (found[0].num_events, found[0].leftovers()) == (0, {})
    assert sum(replayed.leftovers().get(what, 0) > 0 for replayed in found) > 5


def test_a_prefill_core_does_the_same_again(tmp_path: Path) -> None:
    info = make_info(Role.PREFILL)
    engine = EngineCore(EngineLimits(10, 4, 8, 4, 16, 100), overlap_loads=True)
    settings = PrefillSettings(info, PrefillLimits(max_queued=2), 8, 40)
    core = PrefillCore(info, settings.limits, 8, attempt_partial_key, engine.refusal)
    jobs = [make_job(1), make_job(2, 50), make_job(3), make_job(4)]
    events = [
        PeerOpened(CONDUCTOR),
        *(Received("f0", Submit(job)) for job in jobs),
        KvReserved(1, True),
        KvStored(1, 0, 20),
        progress(Drawn(1, 20, (5,), None, (), 0), SequenceReleased(1), added=(b"a" * 16,)),
        KvCommitted(1, 0, 3, True),
        Received("f0", Abort((key(1),))),
        KvReserved(2, False, False),
        Tick(),
    ]
    commands = record(tmp_path / "log", "prefill", settings, core, events)
    said = [type(command.message).__name__ for command in commands if isinstance(command, Send)]
    assert said.count("AttemptFailed") == 3, "one does not fit, one is too many, one cannot be stored"
    assert "KvReady" in said and ReleaseKv(1) in commands
    replayed = replay_log(tmp_path / "log")
    assert (replayed.kind, replayed.num_events, replayed.leftovers()) == ("prefill", len(events), {})


def test_a_frontends_dispatcher_does_the_same_again(tmp_path: Path) -> None:
    """A second attempt's block keys are hashed from the prompt and the first one's token."""
    limits = DispatcherLimits(max_requests=7)
    spec = dispatcher.RequestSpec(1, 15, tokens_to_bytes(range(15)), b"root", (b"k" * 16,), SamplingParams(), 10)
    first = TokenOutput(key(1), 15, (5,), cached_tokens=0, compute_ns=0)
    last = TokenOutput(key(1, 1), 16, (6,), FinishReason.STOP, cached_tokens=8, compute_ns=0)
    heard = (
        (CONDUCTOR, Placed(key(1), "p0", "d0", None, Prediction())),
        ("p0", StepTokens("p0", (first,))),
        ("p0", AttemptFailed("p0", key(1), "store_failed")),
        (CONDUCTOR, Placed(key(1, 1), "p0", "d0", None, Prediction())),
        ("p0", StepTokens("p0", (last,))),
    )
    events = [
        *(dispatcher.PeerOpened(peer) for peer in (CONDUCTOR, "p0", "d0")),
        dispatcher.Start(spec),
        *(dispatcher.Received(sender, message) for sender, message in heard),
    ]
    core = Dispatcher("f0", limits, hashed_keys(8))
    commands = record(tmp_path / "log", "frontend", DispatcherSettings("f0", limits, 8), core, events)
    submitted = [c.message.job for c in commands if isinstance(c, Send) and isinstance(c.message, Submit)]
    assert [len(job.block_keys) for job in submitted] == [1, 2]
    replayed = replay_log(tmp_path / "log")
    assert [ended.num_output for ended in replayed.ended] == [2]
    assert replayed.leftovers() == {}


def test_a_store_core_with_tenants_does_the_same_again(tmp_path: Path) -> None:
    settings = StoreSettings(1 << 16, 7, 4096, quotas={"alice": 8192})
    core = StoreCore(settings.capacity_bytes, epoch=7, alignment=4096, last_number=7, quotas=settings.quotas)
    more = (Reserve(3, 3, (b"c" * 24,), (8192,)), Flush(), UsedElsewhere({"alice": 1 << 16}))
    given = record(tmp_path / "log", "store", settings, core, (ClientTenant(1, "alice"), *STORE_EVENTS, *more))
    assert Usage(7, {"alice": 4096}) in given, "of two objects there was room for one"
    assert replay_log(tmp_path / "log").num_events == len(STORE_EVENTS) + 4


def test_a_torn_last_event_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = store_log(tmp_path / "log")
    data = path.read_bytes()
    last = len(msgspec.msgpack.encode(frames(path)[1][-1]))
    for cut in (1, last, last + 3):  # within the last frame, all of it, within its length
        path.write_bytes(data[:-cut])
        replayed = replay_log(path)
        assert replayed.num_events == len(STORE_EVENTS) - 1
        assert replayed.leftovers() == {"leases": 2}


# ---------------------------------------------------------------- what differs


def test_the_first_differing_command_is_named_down_to_the_field(tmp_path: Path) -> None:
    path = store_log(tmp_path / "log")
    header, entries = frames(path)
    [answer] = msgspec.msgpack.decode(entries[0].commands)
    answer[1]["results"]["offsets"][1] += 1
    entries[0] = msgspec.structs.replace(entries[0], commands=msgspec.msgpack.encode([answer]))
    write(path, header, entries)
    difference = differs(path)
    assert difference.startswith("event 0, Reserve(client=1, request_id=1, keys=(")
    assert difference.endswith(": command 0, Reply.results.offsets[1]: 4097 in the log, 4096 now")


@pytest.mark.parametrize(
    ("commands", "difference"),
    [
        ([], "command 0: nothing in the log, ('Reply', {'type': 'Reply', 'client': 1, 'request_id': 2, 'results': "),
        ([Reserve(1, 2, (), ())], "command 0: ('Reserve', {'type': 'Reserve', 'client': 1, 'request_id': 2, "),
    ],
)
def test_a_command_that_is_missing_or_another_is_named(tmp_path: Path, commands: list[Any], difference: str) -> None:
    path = store_log(tmp_path / "log")
    header, entries = frames(path)
    entries[1] = msgspec.structs.replace(entries[1], commands=encode_commands(commands))
    write(path, header, entries)
    assert differs(path).partition("): ")[2].startswith(difference)


def test_an_event_that_is_missing_shows_in_what_comes_after_it(tmp_path: Path) -> None:
    path = store_log(tmp_path / "log")
    header, entries = frames(path)
    write(path, header, entries[1:])
    assert differs(path) == (
        "event 0, Commit(client=1, request_id=2, numbers=(8, 9), lease=False, checksums=()): "
        "command 0, Reply.results[0]: 0 in the log, 2 now"
    )


def test_an_event_that_the_core_cannot_handle_any_more_is_a_difference(tmp_path: Path) -> None:
    settings = DecodeSettings(make_info(Role.DECODE), 2, 40)
    entry = LogEntry(3, msgspec.Raw(msgspec.msgpack.encode(SourceOpened(1, 8))), encode_commands([]))
    path = tmp_path / "log"
    write(path, LogHeader(LOG_VERSION, "decode", 0, msgspec.to_builtins(settings)), [entry])
    assert differs(path).startswith("event 0, SourceOpened(seq=1, num_tokens=8): AssertionError")


# ---------------------------------------------------------------- no log


@pytest.mark.parametrize("data", [b"", b"\5\0", b"\3\0\0\0abc", b"a text of some length\n" * 9, bytes(100)])
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert refused(path).startswith("not an event log: ")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == "No such file or directory"
    assert refused(tmp_path) == "Is a directory"


def test_another_version_another_core_and_other_settings_are_refused(tmp_path: Path) -> None:
    path = store_log(tmp_path / "log")
    header, entries = frames(path)
    write(path, msgspec.structs.replace(header, version=9), entries)
    assert refused(path) == "event log has version 9, this program reads 1"
    write(path, msgspec.structs.replace(header, core="directory"), entries)
    assert refused(path) == "of a core 'directory', which is not known here"
    write(path, msgspec.structs.replace(header, settings={"epoch": 1}), entries)
    assert refused(path) == "Object missing required field `capacity_bytes`"


def test_a_frame_that_is_no_event_of_this_core_is_refused(tmp_path: Path) -> None:
    path = store_log(tmp_path / "log")
    header, entries = frames(path)
    strange = msgspec.Raw(msgspec.msgpack.encode({"type": "Evict"}))
    write(path, header, [entries[0], msgspec.structs.replace(entries[1], event=strange)])
    assert refused(path) == "event 1: Invalid value 'Evict' - at `$.type`"
    write(path, header, [*entries[:2], "no entry"])
    assert refused(path).startswith("event 2: Expected `array`, got `str`")
