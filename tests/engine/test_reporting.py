"""What an instance tells the Conductor, report by report."""

from __future__ import annotations

from typing import Any

import msgspec

from mooncake.core.messages import (
    CONDUCTOR,
    CacheDelta,
    CacheSnapshot,
    Drain,
    Hold,
    LoadReport,
    Register,
    Registered,
    Send,
    SnapshotRequest,
    StateChange,
)
from mooncake.core.types import InstanceLoad, InstanceState, Role, Tier
from mooncake.engine.attempts import EngineProgress, ListBlocks
from mooncake.engine.core import EngineLoad
from mooncake.engine.reporting import REPORT_NS, InstanceReporter
from tests.engine.jobs import make_info

INFO = make_info(Role.DECODE)
LOAD = EngineLoad(
    num_waiting=2,
    waiting_tokens=30,
    num_running=3,
    context_tokens=70,
    free_pages=4,
    waiting_context=50,
    num_computed_tokens=900,
)


def messages(sends: list[Send]) -> list[Any]:
    assert all(send.to == CONDUCTOR for send in sends)
    return [send.message for send in sends]


def connected() -> InstanceReporter:
    reporter = InstanceReporter(INFO)
    reporter.opened(0, 0, 0)
    return reporter


def moved(added: tuple[bytes, ...] = (), removed: tuple[bytes, ...] = (), step_ns: int = 0) -> EngineProgress:
    return EngineProgress((), LOAD, step_ns, added, removed)


def snapshot_of(reporter: InstanceReporter, *keys: bytes) -> list[Any]:
    """Asked for by the Conductor, and by the reporter of the engine, which has these keys."""
    assert reporter.received(SnapshotRequest("i0", Tier.HBM)) == [ListBlocks()]
    return messages(reporter.progress(EngineProgress((), LOAD, cached=keys), 0))


def delta(seq: int, added: tuple[bytes, ...] = (), removed: tuple[bytes, ...] = ()) -> CacheDelta:
    return CacheDelta("i0", 1, seq, Tier.HBM, added, removed)


def snapshot(seq: int, *keys: bytes) -> CacheSnapshot:
    return CacheSnapshot("i0", 1, seq, Tier.HBM, keys)


def told(reporter: InstanceReporter, now: int) -> list[Any]:
    assert reporter.deadline() == now
    assert reporter.due(now) and not reporter.due(now - 1)
    return messages(reporter.report(0, 0, 0))


def test_a_connection_starts_with_who_it_is_and_its_load() -> None:
    load = InstanceLoad("i0", 1, 1, 2, 40, 0, 0, INFO.num_pages, 0, 40, 3)
    found = messages(InstanceReporter(INFO).opened(2, 40, 3))
    assert found == [Register(INFO), LoadReport(load)]


def test_the_load_is_the_engines_and_what_waits_before_it() -> None:
    reporter = connected()
    reporter.progress(moved(step_ns=1000), 5)
    [report] = messages(reporter.report(1, 100, 6))
    assert report.load == InstanceLoad("i0", 1, 2, 3, 130, 3, 70, 4, 1000, 150, 6, 900)


def test_changes_are_told_together_a_while_after_the_first() -> None:
    reporter = connected()
    assert reporter.deadline() is None and not reporter.due(10 * REPORT_NS), "nothing changed"
    reporter.touch(10)
    reporter.progress(moved(), 20)
    assert [report.load.seq for report in told(reporter, 10 + REPORT_NS)] == [2]
    assert reporter.deadline() is None
    reporter.touch(5 * REPORT_NS)
    assert [report.load.seq for report in told(reporter, 6 * REPORT_NS)] == [3]


def test_the_time_of_a_step_is_the_mean_of_the_last_ones() -> None:
    reporter = connected()
    times = []
    for step_ns in (1000, 2000, 0, 400):
        reporter.progress(moved(step_ns=step_ns), 0)
        times += [report.load.step_ns for report in told(reporter, REPORT_NS)]
    assert times == [1000, 1250, 1250, 1037], "rounds without a step do not count"


def test_blocks_are_told_by_numbered_differences_before_the_load() -> None:
    reporter = connected()
    reporter.progress(moved((b"a", b"b")), 0)
    first, report = told(reporter, REPORT_NS)
    assert first == delta(1, (b"a", b"b")) and isinstance(report, LoadReport)
    reporter.progress(moved(step_ns=5), 0)
    assert [type(message) for message in told(reporter, REPORT_NS)] == [LoadReport]
    reporter.progress(moved((b"c",), (b"a",)), 0)
    assert told(reporter, REPORT_NS)[0] == delta(2, (b"c",), (b"a",))
    assert snapshot_of(reporter, b"b", b"c") == [snapshot(2, b"b", b"c")]


def test_a_block_that_came_and_went_between_two_reports_is_in_neither() -> None:
    reporter = connected()
    reporter.progress(moved((b"a", b"b")), 0)
    told(reporter, REPORT_NS)
    reporter.progress(moved((b"c", b"d"), (b"a", b"b")), 0)
    reporter.progress(moved((b"a",), (b"c",)), 1)
    assert told(reporter, REPORT_NS)[0] == delta(2, (b"d",), (b"b",))
    assert snapshot_of(reporter, b"d", b"a") == [snapshot(2, b"d", b"a")]


def test_what_a_snapshot_contains_is_not_told_again() -> None:
    reporter = connected()
    reporter.progress(moved((b"a",)), 0)
    assert snapshot_of(reporter, b"a") == [snapshot(0, b"a")]
    assert [type(message) for message in told(reporter, REPORT_NS)] == [LoadReport]


def test_what_changed_without_a_connection_is_in_the_snapshot_of_the_next() -> None:
    reporter = connected()
    reporter.progress(moved((b"a",)), 0)
    reporter.closed()
    reporter.progress(moved((b"b",), (b"a",)), 1)
    assert reporter.change_state(InstanceState.DRAINING) == []
    assert reporter.deadline() is None and not reporter.due(9 * REPORT_NS)
    register, report = messages(reporter.opened(0, 0, 0))
    assert register == Register(msgspec.structs.replace(INFO, state=InstanceState.DRAINING))
    assert report.load.num_running == 3 and report.load.seq == 2
    assert snapshot_of(reporter, b"b") == [snapshot(0, b"b")]
    reporter.progress(moved((b"c",)), 2)
    assert told(reporter, REPORT_NS)[0] == delta(1, (b"c",))


def test_a_held_instance_says_so_at_registration_and_tells_when_its_attempts_go() -> None:
    reporter = connected()
    reporter.count(1, 0)
    assert reporter.deadline() is None, "nobody waits for it"
    assert reporter.received(Hold("i0", True)) == []
    reporter.count(0, 5)
    assert reporter.deadline() is None, "as it was told"
    reporter.count(1, 10)
    assert reporter.deadline() == 10 + REPORT_NS
    assert [report.load.num_attempts for report in messages(reporter.report(0, 0, 1))] == [1]
    reporter.count(1, 20)
    assert reporter.deadline() is None
    reporter.count(0, 30)
    assert reporter.deadline() == 30 + REPORT_NS
    assert messages(reporter.opened(0, 0, 0))[0] == Register(msgspec.structs.replace(INFO, held=True))
    reporter.received(Hold("i0", False))
    reporter.count(1, 40)
    assert reporter.deadline() is None and messages(reporter.opened(0, 0, 0))[0] == Register(INFO)


def test_a_change_of_state_is_told() -> None:
    reporter = connected()
    found = messages(reporter.change_state(InstanceState.DRAINING))
    assert found == [StateChange("i0", 1, InstanceState.DRAINING, INFO.cost)]


def test_a_refused_registration_is_remembered_until_it_is_accepted() -> None:
    reporter = connected()
    assert reporter.received(Registered(False, "compat c, not d")) == []
    assert reporter.refused == "compat c, not d"
    assert reporter.received(Drain("i0")) == [] and reporter.refused is not None
    reporter.received(Registered(True))
    assert reporter.refused is None
