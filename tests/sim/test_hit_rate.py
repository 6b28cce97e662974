"""One cache over a trace: small cases by hand, policies against models, and the figures of FACTS section 4."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.sim.hit_rate import Future, HitRate, PrefixCache, hit_rate
from mooncake.store.core import StoreCore
from mooncake.store.events import Commit, Lease, Release, Reply, Reserve
from mooncake.store.eviction import POLICIES, EvictionPolicy, Learned, Lfu, Lru
from mooncake.trace.files import open_trace
from mooncake.trace.types import TraceRequest
from tests.trace.helpers import real_trace, requests_of

CAPACITIES = (1_000, 5_859, 10_000, 30_000, 50_000, None)
"""The last is endless, the same for all policies, and tried with one."""
FACTS = {
    ("conversation_trace.jsonl", "lru"): (0.045, 0.138, 0.215, 0.332, 0.362, 0.374),
    ("conversation_trace.jsonl", "lfu"): (0.049, 0.098, 0.134, 0.281, 0.351),
    ("conversation_trace.jsonl", "belady"): (0.191, 0.353, 0.366, 0.366, 0.366, 0.366),
    ("synthetic_trace.jsonl", "lru"): (0.084, 0.315, 0.431, 0.636, 0.651, 0.651),
    ("synthetic_trace.jsonl", "lfu"): (0.039, 0.245, 0.360, 0.637, 0.651),
    ("synthetic_trace.jsonl", "belady"): (0.277, 0.550, 0.618, 0.640, 0.640, 0.640),
}
"""The last row of Belady is by block as well, where FACTS repeats the rate by token."""

PROMPTS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=25)


@functools.cache
def trace(name: str) -> Sequence[TraceRequest]:
    return tuple(open_trace(real_trace(name)))


def rate(prompts: Sequence[str], policy: EvictionPolicy, capacity: int | None) -> HitRate:
    found = hit_rate(requests_of(*prompts), 10, policy, capacity)
    assert found is not None
    return found


def matched(prompts: Sequence[str], policy: EvictionPolicy, capacity: int | None) -> list[int]:
    cache = PrefixCache(policy, capacity)
    found = []
    for request in requests_of(*prompts):
        found.append(cache.serve(request.hash_ids or ()))
        assert capacity is None or len(cache) <= capacity
    return found


def test_lru_evicts_suffixes_first() -> None:
    # abc leaves ab; xy leaves x and, of ab, the more recent a; then a is found.
    assert matched(["abc", "ab", "xy", "a", "ab"], Lru(), 3) == [0, 2, 0, 1, 1]


def test_lfu_keeps_what_is_used_often() -> None:
    assert matched(["a", "a", "b", "c", "a"], Lfu(), 1) == [0, 1, 0, 0, 1]
    assert matched(["a", "a", "b", "c", "a"], Lru(), 1) == [0, 1, 0, 0, 0]


def test_lfu_forgets_uses_with_the_object() -> None:
    policy, sizes = Lfu(), [1, 1, 1]
    policy.add((1,), (b"a",), sizes, (None,))
    policy.idle((1,))
    policy.hold((1,))
    policy.idle((1,))
    policy.add((2,), (b"b",), sizes, (None,))
    assert len(policy) == 1  # 2 is still leased
    policy.idle((2,))
    assert len(policy) == 2 and policy.take(1, sizes) == [2]
    policy.add((2,), (b"c",), sizes, (None,))
    policy.idle((2,))
    assert policy.take(2, sizes) == [2, 1] and policy.take(1, sizes) == [] and len(policy) == 0
    policy.add((1, 2), (b"a", b"b"), sizes, (None, 1))
    policy.discard((1,))
    policy.idle((2,))
    assert policy.take(9, sizes) == [2]


def test_lru_takes_no_more_than_it_must_and_nothing_that_is_held() -> None:
    policy, sizes = Lru(), [5, 5, 3, 5, 5, 5]
    rows = range(6)
    policy.add(rows, [b""] * 6, sizes, [None] * 6)
    policy.idle(rows)  # 5 goes first
    assert policy.take(1, sizes) == [5] and policy.take(6, sizes) == [4, 3]
    policy.hold((1, 2))
    assert len(policy) == 1
    policy.idle((2, 1))
    assert policy.take(4, sizes) == [0] and policy.take(4, sizes) == [1] and policy.take(4, sizes) == [2]
    assert policy.take(4, sizes) == [] and len(policy) == 0


def test_what_does_not_fit_is_evicted_when_the_request_ends() -> None:
    assert matched(["abcd", "abcd", "abcd"], Lru(), 2) == [0, 2, 2]
    assert matched(["abcd", "abcd"], Lru(), None) == [0, 4]


def test_rates() -> None:
    found = rate(["ab", "abc", "x"], Lru(), None)
    assert (found.by_token, found.by_block, found.per_request) == (20 / 60, 2 / 6, pytest.approx(2 / 9))
    assert hit_rate([TraceRequest(0, 10, 1)], 10, Lru(), None) is None


class NaiveLfu:
    """By definition, with a scan."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.idle_since: dict[int, int] = {}
        self.clock = 0

    def __len__(self) -> int:
        return len(self.idle_since)

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        for row in rows:
            self.uses[row] = 1

    def hold(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.uses[row] += 1
            del self.idle_since[row]

    def idle(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.clock += 1
            self.idle_since[row] = self.clock

    def discard(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self.uses[row]

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        order = sorted(self.idle_since, key=lambda row: (self.uses[row], self.idle_since[row]))
        taken = order[
            : next(
                (at + 1 for at in range(len(order)) if sum(sizes[row] for row in order[: at + 1]) >= num_bytes), None
            )
        ]
        for row in taken:
            del self.uses[row], self.idle_since[row]
        return taken


@given(PROMPTS, st.integers(1, 8))
def test_lfu_is_what_its_definition_says(prompts: list[str], capacity: int) -> None:
    assert matched(prompts, Lfu(), capacity) == matched(prompts, NaiveLfu(), capacity)


def best_by_block(blocks: tuple[int, ...], capacity: int) -> int:
    """Most hits of any policy that may leave out what it likes, by trying all."""

    @functools.cache
    def best(at: int, cached: frozenset[int]) -> int:
        if at == len(blocks):
            return 0
        block = blocks[at]
        if block in cached:
            return 1 + best(at + 1, cached)
        if len(cached) < capacity:
            return best(at + 1, cached | {block})
        kept = (cached - {other} | {block} for other in cached)
        return max(best(at + 1, cached), *(best(at + 1, others) for others in kept))

    return best(0, frozenset())


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=6), st.integers(1, 3))
def test_belady_is_the_best_by_block(prompts: list[str], capacity: int) -> None:
    requests = requests_of(*prompts)
    blocks = tuple(block for request in requests for block in request.hash_ids or ())
    assert Future(requests).belady(capacity) == pytest.approx(best_by_block(blocks, capacity) / len(blocks))


@given(PROMPTS, st.integers(1, 12))
def test_no_policy_beats_the_bounds(prompts: list[str], capacity: int) -> None:
    endless = rate(prompts, Lru(), None)
    bound = Future(requests_of(*prompts)).belady(None)
    assert endless.by_block == pytest.approx(bound)
    for make in POLICIES.values():
        assert rate(prompts, make(), capacity).hit_tokens <= endless.hit_tokens


@pytest.mark.parametrize(("name", "policy"), FACTS)
def test_figures_of_facts(name: str, policy: str) -> None:
    requests = trace(name)
    future = Future(requests)
    for capacity, fact in zip(CAPACITIES, FACTS[name, policy], strict=False):
        if policy == "belady":
            assert future.belady(capacity) == pytest.approx(fact, abs=0.001)
        else:
            found = hit_rate(requests, 512, POLICIES[policy](), capacity)
            assert found is not None and found.by_token == pytest.approx(fact, abs=0.003)


@pytest.mark.parametrize("name", ["conversation_trace.jsonl", "synthetic_trace.jsonl"])
def test_learned_is_nowhere_below_lru(name: str) -> None:
    requests = trace(name)
    for capacity in CAPACITIES[:-1]:
        of_lru, found = (hit_rate(requests, 512, make(), capacity) for make in (Lru, Learned))
        assert of_lru is not None and found is not None and found.by_token >= of_lru.by_token
        if capacity == 5_859 and name.startswith("conversation"):
            assert found.by_token >= 0.175


def popular(rng: random.Random, new: Iterator[int]) -> list[tuple[int, ...]]:
    """Prompts of which some are wanted far more often than others, each followed by something of its own."""
    prompts = [tuple(next(new) for _ in range(rng.randint(5, 20))) for _ in range(100)]
    weights = [1 / (rank + 1) for rank in range(100)]
    return [(*rng.choices(prompts, weights)[0], next(new), next(new)) for _ in range(2000)]


def scanned(rng: random.Random, new: Iterator[int]) -> list[tuple[int, ...]]:
    """The same, and every other prompt is a long one that nobody wants again."""
    return [chain for often in popular(rng, new) for chain in (often, tuple(next(new) for _ in range(30)))]


def bursts(rng: random.Random, new: Iterator[int]) -> list[tuple[int, ...]]:
    """Each prompt is wanted some ten times, soon, and never again: nothing is better than LRU."""
    live: list[tuple[int, ...]] = [()] * 20
    chains = []
    for _ in range(2000):
        at = rng.randrange(20)
        if not live[at] or rng.random() < 0.1:
            live[at] = tuple(next(new) for _ in range(rng.randint(5, 20)))
        chains.append((*live[at], next(new)))
    return chains


def one_for_all(rng: random.Random, new: Iterator[int]) -> list[tuple[int, ...]]:
    """All share one prompt."""
    prompt = tuple(next(new) for _ in range(30))
    return [(*prompt, next(new), next(new)) for _ in range(2000)]


@pytest.mark.parametrize(("workload", "gain"), [(popular, 0.05), (scanned, 0.1), (bursts, -0.01), (one_for_all, 0.0)])
def test_learned_on_workloads(workload: Callable[..., list[tuple[int, ...]]], gain: float) -> None:
    """Against LRU in a store of 300 blocks: what it gains, or loses at most."""
    chains = workload(random.Random(1), itertools.count())
    requests = [TraceRequest(at, 10 * len(chain), 1, chain) for at, chain in enumerate(chains)]
    of_lru, found = (hit_rate(requests, 10, make(), 300) for make in (Lru, Learned))
    assert of_lru is not None and found is not None and found.by_token >= of_lru.by_token + gain


@pytest.mark.parametrize("name", POLICIES)
def test_policies_order_the_objects_of_a_store(name: str) -> None:
    """The same object that orders this cache orders a store node's; the node's own laws hold all the time."""
    core = StoreCore(4 * 4096, epoch=1, policy=POLICIES[name]())
    request_id = 0

    def ask(make: type, *args: object, **fields: object) -> Any:
        nonlocal request_id
        request_id += 1
        [results] = [
            each.results
            for each in core.handle(make(1, request_id, *args, **fields), request_id)
            if isinstance(each, Reply)
        ]
        core.check_integrity()
        return results

    for key in b"abcdabea":
        leased = ask(Lease, (bytes([key]) * 24,)).numbers
        if leased != (None,):
            ask(Release, leased)
            continue
        ask(Commit, ask(Reserve, (bytes([key]) * 24,), (100,)).numbers, lease=False)
    held = [chr(key) for key in b"abcde" if ask(Lease, (bytes([key]) * 24,)).numbers != (None,)]
    if name in ("fifo", "s3fifo"):
        assert held == ["a", "c", "d", "e"]  # a and b came first, one use more or not, and a came again
    else:
        assert held == ["a", "b", "d", "e"]  # c was the oldest, and is one of those used once
