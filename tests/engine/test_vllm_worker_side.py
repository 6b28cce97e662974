"""KV goes from one engine's pages into a store and from there into another's, byte for byte: pages of 4 tokens, blocks of 8."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mooncake.core.errors import ConfigError
from mooncake.core.keys import object_keys
from mooncake.engine import kv_mover
from mooncake.engine.vllm.layout import KvShape, geometry
from mooncake.engine.vllm.pages import KvPages
from mooncake.engine.vllm.plans import FetchPlan, LoadPlan, SavePlan, StepPlans
from mooncake.engine.vllm.worker_side import Finished, WorkerSide
from mooncake.store.api import Store
from mooncake.store.node import StoreNode
from tests.store.helpers import TOKEN, run, running_node

LAYERS, HEADS, HEAD, PAGE, BLOCK = 3, 2, 4, 4, 8
SHAPE = KvShape("float32", HEADS, HEAD, PAGE, BLOCK, LAYERS, HEADS * HEAD * 4)
KEYS = tuple(bytes([at]) * 16 for at in range(1, 4))
NUM_PAGES = 12
WAIT_S = 5.0


def plan_of(number: int, start: int, end: int, pages: tuple[int, ...], *, ahead: bool = False) -> LoadPlan:
    return LoadPlan("r", number, start, end, pages, ahead)


class Worker:
    """A worker's side with pages of its own; filled: with numbers that no other has."""

    def __init__(self, store: Store, filled: bool) -> None:
        shape = (NUM_PAGES, HEADS, PAGE, HEAD)
        self.kv = {f"layer.{at}": torch.rand(shape) if filled else torch.zeros(shape) for at in range(LAYERS)}
        self.side = WorkerSide(store, KvPages(self.kv, SHAPE), geometry(PAGE, BLOCK), SHAPE.shard(0, 0))

    def save(self, *plans: SavePlan, preempted: bool = False) -> None:
        self.side.begin_step(StepPlans(saves=plans))
        for layer in range(LAYERS - 1):  # of the last one nobody tells
            self.side.layer_computed(layer)
        if preempted:
            self.side.give_up([plan.request for plan in plans])
        self.side.end_step()

    def fetch(self, plan: FetchPlan) -> int:
        """Up to which token it came."""
        self.side.begin_step(StepPlans(fetches=(plan,)))
        [(number, end)] = self.until(lambda finished: finished.fetched).fetched
        assert number == plan.number
        return end

    def load(self, *plans: LoadPlan) -> None:
        """In a step that computes nothing of its own."""
        self.side.begin_step(StepPlans(loads=plans))
        self.side.start_loads(StepPlans(loads=plans))
        self.side.end_step()

    def until(self, look: Callable[[Finished], Any], ended: tuple[str, ...] = ()) -> Finished:
        deadline = time.monotonic() + WAIT_S
        while not look(finished := self.side.take_finished(ended)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return finished

    def rows(self, *pages: int) -> torch.Tensor:
        return torch.stack([layer[list(pages)] for layer in self.kv.values()])


class Two:
    """A writer and a reader beside one node."""

    def __init__(self, node: StoreNode, at: int) -> None:
        self.node = node
        self.client = Store.connect([node.addresses[at]], token=TOKEN)
        self.writer = Worker(Store.connect([node.addresses[at]], token=TOKEN), filled=True)
        self.reader = Worker(Store.connect([node.addresses[at]], token=TOKEN), filled=False)

    def save(self, num_tokens: int, pages: tuple[int, ...]) -> None:
        self.writer.save(SavePlan("w", 0, num_tokens, num_tokens, KEYS[: -(-num_tokens // BLOCK)], pages))
        assert self.writer.until(lambda finished: finished.saved, ("w",)).saved == {"w"}

    def close(self) -> None:
        self.writer.side.close()
        self.reader.side.close()
        self.client.close()


def with_two(at: int, act: Callable[[Two], None], **options: Any) -> None:
    async def main() -> None:
        async with running_node(**({"capacity_bytes": 1 << 16} | options)) as node:
            two = await asyncio.to_thread(Two, node, at)
            try:
                await asyncio.to_thread(act, two)
            finally:
                await asyncio.to_thread(two.close)
            node.core.check_integrity()
            assert node.core.metrics()["reservations"] == 0

    run(main())


over_both = pytest.mark.parametrize("at", [0, 1], ids=["unix", "tcp"])


@over_both
def test_blocks_and_the_tail_arrive_in_other_pages_as_they_were(at: int) -> None:
    def act(two: Two) -> None:
        two.save(18, (5, 2, 9, 0, 7))
        assert two.reader.fetch(FetchPlan(1, 0, 18, 18, KEYS)) == 18
        two.reader.load(plan_of(1, 0, 17, (1, 3, 4, 6, 8)))
        assert torch.equal(two.reader.rows(1, 3, 4, 6, 8), two.writer.rows(5, 2, 9, 0, 7))
        assert not two.reader.rows(0, 2, 5, 7, 9, 10, 11).any(), "other pages are as they were"

    with_two(at, act)


@over_both
def test_a_load_may_begin_within_a_block(at: int) -> None:
    def act(two: Two) -> None:
        two.save(16, (5, 2, 9, 0))
        assert two.reader.fetch(FetchPlan(1, 4, 16, 16, KEYS[:2])) == 16
        two.reader.load(plan_of(1, 4, 15, (11, 3, 4, 6)))
        assert torch.equal(two.reader.rows(3, 4, 6), two.writer.rows(2, 9, 0)) and not two.reader.rows(11).any()

    with_two(at, act)


@over_both
def test_a_damaged_block_ends_a_fetch_and_what_is_before_it_can_be_loaded(at: int) -> None:
    def act(two: Two) -> None:
        two.save(24, (0, 1, 2, 3, 4, 5))
        second = object_keys(KEYS, SHAPE.shard(0, 0))[1]
        with Store.connect([two.node.addresses[0]], token=TOKEN) as local, local.leased([second]) as objects:
            [place] = objects.locations
            assert place is not None
            memory = objects.link.path.view(place.offset, 1)
            assert memory is not None
            memory[0] ^= 1
        assert two.reader.fetch(FetchPlan(1, 0, 24, 24, KEYS)) == 8
        two.reader.load(plan_of(1, 0, 8, (6, 7)))
        assert torch.equal(two.reader.rows(6, 7), two.writer.rows(0, 1)) and not two.reader.rows(8, 9, 10, 11).any()
        assert two.client.exists_batch(object_keys(KEYS, SHAPE.shard(0, 0))) == [True, False, True]
        assert two.node.core.metrics()["damaged"] == 1

    with_two(at, act)


@over_both
def test_what_is_not_there_or_of_another_size_is_told(at: int) -> None:
    def act(two: Two) -> None:
        two.save(8, (0, 1))
        assert two.reader.fetch(FetchPlan(1, 0, 16, 16, KEYS[:2])) == 8
        assert two.reader.fetch(FetchPlan(2, 8, 16, 16, KEYS[:2])) == 8
        assert two.reader.fetch(FetchPlan(3, 0, 4, 4, KEYS[:1])) == 0

    with_two(at, act)


def test_a_layer_waits_for_its_own_part_and_the_page_that_the_step_goes_on_writing_is_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first layer is computed while the second is not loaded yet."""

    def act(two: Two) -> None:
        two.save(18, (5, 2, 9, 0, 7))
        two.reader.fetch(FetchPlan(1, 0, 18, 18, KEYS))
        plans = StepPlans(loads=(plan_of(1, 0, 17, (1, 3, 4, 6, 8)),))
        may_go_on, write = threading.Event(), KvPages.write_pages

        def slow(self: KvPages, layer: int, *rest: Any) -> None:
            if layer and rest[1] < 16:
                assert may_go_on.wait(WAIT_S)
            write(self, layer, *rest)

        monkeypatch.setattr(KvPages, "write_pages", slow)
        two.reader.side.begin_step(plans)
        two.reader.side.start_loads(plans)
        assert torch.equal(two.reader.rows(8), two.writer.rows(7)), "in all layers, before the step computes any"
        two.reader.kv["layer.0"][8, :, 1] = 7.0  # the step's own token
        two.reader.side.wait_layer(0)
        assert torch.equal(two.reader.kv["layer.0"][[1, 3, 4, 6]], two.writer.kv["layer.0"][[5, 2, 9, 0]])
        assert not two.reader.kv["layer.1"][[1, 3, 4, 6]].any()
        may_go_on.set()
        two.reader.side.wait_layer(LAYERS - 1)
        two.reader.side.end_step()
        assert torch.equal(two.reader.rows(1, 3, 4, 6), two.writer.rows(5, 2, 9, 0))
        assert (two.reader.kv["layer.0"][8, :, 1] == 7.0).all()

    with_two(0, act)


def test_a_load_that_is_not_copied_in_time_stops_the_engine_and_makes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(two: Two) -> None:
        two.save(16, (5, 2, 9, 0))
        two.reader.fetch(FetchPlan(1, 0, 16, 16, KEYS[:2]))
        may_go_on, write = threading.Event(), KvPages.write_pages

        def never(self: KvPages, *rest: Any) -> None:
            may_go_on.wait(WAIT_S)
            write(self, *rest)

        monkeypatch.setattr(KvPages, "write_pages", never)
        two.reader.side.start_loads(StepPlans(loads=(plan_of(1, 0, 16, (1, 3, 4, 6)),)))
        monkeypatch.setattr(kv_mover, "LOAD_TIMEOUT_S", 0.01)
        with pytest.raises(RuntimeError, match=r"tokens \[0, 16\) of a request were not copied into its pages"):
            two.reader.side.wait_layer(0)
        may_go_on.set()

    with_two(0, act)


@over_both
def test_a_load_ahead_holds_up_no_step_and_is_told(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(two: Two) -> None:
        two.save(18, (5, 2, 9, 0, 7))
        two.reader.fetch(FetchPlan(1, 0, 18, 18, KEYS))
        two.reader.fetch(FetchPlan(2, 0, 8, 8, KEYS[:1]))
        may_go_on, write = threading.Event(), KvPages.write_pages

        def slow(self: KvPages, layer: int, pages: Any, *rest: Any) -> None:
            if pages[0] == 1:
                assert may_go_on.wait(WAIT_S)
            write(self, layer, pages, *rest)

        monkeypatch.setattr(KvPages, "write_pages", slow)
        two.reader.load(plan_of(1, 0, 17, (1, 3, 4, 6, 8), ahead=True))
        two.reader.load(plan_of(2, 0, 8, (10, 11)))  # a step of its own, meanwhile
        assert torch.equal(two.reader.rows(10, 11), two.writer.rows(5, 2)) and not two.reader.rows(1, 3, 4, 6, 8).any()
        assert two.reader.side.take_finished(()) == Finished()
        may_go_on.set()
        assert two.reader.until(lambda finished: finished.loaded).loaded == {"r"}
        assert torch.equal(two.reader.rows(1, 3, 4, 6, 8), two.writer.rows(5, 2, 9, 0, 7))

    with_two(at, act)


@over_both
def test_leases_end_with_the_load_or_when_the_fetch_is_dropped(at: int) -> None:
    def act(two: Two) -> None:
        two.save(16, (5, 2, 9, 0))
        for number in (1, 2):
            two.reader.fetch(FetchPlan(number, 0, 16, 16, KEYS[:2]))
        shard = SHAPE.shard(0, 0)
        two.reader.load(plan_of(1, 0, 16, (1, 3, 4, 6)))
        two.reader.side.begin_step(StepPlans(fetches=(FetchPlan(3, 0, 16, 16, KEYS[:2]),), dropped=(2, 3)))
        assert two.client.remove_batch(object_keys(KEYS[:2], shard)) == [True, True]
        deadline = time.monotonic() + WAIT_S
        while two.node.core.metrics()["leases"] or two.node.core.metrics()["used_bytes"]:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert two.reader.side.take_finished(()) == Finished()

    with_two(at, act)


def test_a_preempted_request_commits_nothing_and_another_one_does() -> None:
    def act(two: Two) -> None:
        plan = SavePlan("w", 0, 16, 16, KEYS[:2], (0, 1, 2, 3))
        two.writer.save(plan, preempted=True)
        two.writer.until(lambda finished: finished.saved, ("w",))
        assert two.client.exists_batch(object_keys(KEYS[:2], SHAPE.shard(0, 0))) == [False, False]
        two.save(16, (0, 1, 2, 3))
        assert two.client.exists_batch(object_keys(KEYS[:2], SHAPE.shard(0, 0))) == [True, True]

    with_two(0, act)


def test_a_request_is_told_as_saved_only_when_it_has_ended_and_once() -> None:
    def act(two: Two) -> None:
        two.writer.save(SavePlan("w", 0, 8, 16, KEYS[:2], (0, 1)))
        two.writer.save(SavePlan("w", 8, 16, 16, KEYS[:2], (0, 1, 2, 3)))
        shard = SHAPE.shard(0, 0)
        two.writer.until(lambda finished: all(two.client.exists_batch(object_keys(KEYS[:2], shard))))
        assert two.writer.side.take_finished(()) == Finished()
        assert two.writer.until(lambda finished: finished.saved, ("w", "unknown")).saved == {"w"}
        assert two.writer.side.take_finished(("w",)) == Finished()

    with_two(0, act)


def test_a_store_that_is_gone_or_full_costs_no_more_than_the_copies() -> None:
    def act(two: Two) -> None:
        two.save(24, (0, 1, 2, 3, 4, 5))  # no room for the third block
        shard = SHAPE.shard(0, 0)
        assert two.client.exists_batch(object_keys(KEYS, shard)) == [True, True, False]

    object_bytes = LAYERS * BLOCK * HEADS * HEAD * 4
    with_two(0, act, capacity_bytes=2 * object_bytes)


def test_kv_of_a_shape_that_is_not_understood_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"KV cache of a: torch.float32\[2, 5, 4, 2, 4\], expected float32\[pages, 2, 4, 4\]"
    ):
        KvPages({"a": torch.zeros(2, 5, 4, 2, 4)}, SHAPE)
    with pytest.raises(ConfigError, match="a page is not contiguous"):
        KvPages({"a": torch.zeros(5, 4, 2, 4).transpose(1, 2)}, SHAPE)
