"""A loop that was stirred turns by itself for a while, and then sleeps; not at all where processors are wanted by others."""

import asyncio
import time

import pytest

from mooncake.store import wakeful
from mooncake.store.wakeful import AWAKE_S, Patience, Wakeful

pytestmark = pytest.mark.quiet


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeful, "_num_running", lambda: 1)


async def _turns_after_a_stir() -> tuple[int, float, int]:
    """How often it turned, for how long, and how often later."""
    turns, last_at = 0, time.monotonic()

    class Counted(Wakeful):
        def _turn(self) -> None:
            nonlocal turns, last_at
            turns += 1
            super()._turn()
            last_at = time.monotonic()

    loop, began = Counted(), time.monotonic()
    loop.stir()
    loop.stir()  # the same again, no second one
    await asyncio.sleep(50 * AWAKE_S)
    before = turns
    await asyncio.sleep(50 * AWAKE_S)
    return before, last_at - began, turns - before


def test_it_turns_until_nothing_has_come_for_a_while_and_no_longer() -> None:
    num_turns, lasted_s, later = asyncio.run(_turns_after_a_stir())
    assert num_turns > 1 and lasted_s >= AWAKE_S and later == 0


def test_where_others_wait_for_a_processor_nobody_stays_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeful, "_num_running", lambda: 1 << 20)
    num_turns, _, later = asyncio.run(_turns_after_a_stir())
    assert num_turns == 1 and later == 0


def test_processors_are_looked_for_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(wakeful, "_num_running", lambda: looks.append(1) or 1)
    patience, until = Patience(), time.monotonic() + 0.02
    num_starts = 0
    while time.monotonic() < until:
        patience.start()
        num_starts += 1
    assert 1 <= len(looks) <= 4 < num_starts
