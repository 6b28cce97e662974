"""The connector in vLLM's scheduler, decided: what each request fetches, loads and saves.

    known --match--> fetching --fetched--> ready --allocated--> [loading ahead] --> computing --finished--> gone
       |                                     |                                         ^
       +------- nothing to load -------------+-----------------------------------------+

Rules:
* Of what the store has, all is loaded that vLLM's own cache lacks, but for the prompt's last token: its logits give the next.
* A request is fetched before vLLM gives it pages: objects are leased where they are on this machine, or come over the network,
  and are compared with their checksums. Only what is at hand, and whole, is promised to vLLM. So a load, which copies it into
  pages, cannot fail, and what cannot be had costs no page.
* A short load is copied layer by layer while the request's own step computes. All others of that step wait along, which a long
  one would stall: it is loaded ahead, while steps without the request go on.
* What is fetched and not yet loaded is bounded. Beyond that, requests wait and ask again.
* A fetch that brings less than the store had is not tried again: the request computes what is missing.
* All that the store did not have when the request was matched is saved, block by block, as steps compute them, and the tail at
  the end of the prompt. An object is written in one step, in the order of its layers: so it has a checksum.
* What a request generates is not saved.
* Pages of a request that has saved anything belong to the workers until they say that they are done.

No clock is read, no store is asked: the caller passes the time, and what was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from mooncake.engine.vllm.layout import Geometry
from mooncake.engine.vllm.plans import FetchPlan, LoadPlan, SavePlan, StepPlans
from mooncake.engine.vllm.requests import RequestKeys


class Found(msgspec.Struct, frozen=True):
    """What the store has of a request: how many leading blocks, and whether the tail, too."""

    num_blocks: int = 0
    tail: bool = False


class Scheduled(msgspec.Struct, frozen=True):
    """A request's part in a step: tokens [num_computed, num_computed + num_scheduled). pages: those it got, or all of them if
    `resumed` or new."""

    request: str
    num_computed: int
    num_scheduled: int
    pages: Sequence[int] = ()
    resumed: bool = False


class _Fetch:
    """Of tokens [start, end). num_missing: workers that have not told yet how much they got."""

    __slots__ = ("end", "num_missing", "num_tokens", "number", "start")

    def __init__(self, number: int, start: int, end: int, num_missing: int) -> None:
        self.number = number
        self.start = start
        self.end = end
        self.num_tokens = end - start
        self.num_missing = num_missing


class _Request:
    __slots__ = ("asked_at", "fetch", "keys", "may_load", "num_local", "pages", "saved", "saves")

    def __init__(self, keys: RequestKeys) -> None:
        self.keys = keys
        self.asked_at: int | None = None
        self.fetch: _Fetch | None = None
        self.num_local = 0
        self.pages: list[int] = []
        self.saved: int | None = None
        """Up to here the store has it, or is being given it; None: not known yet."""
        self.saves = False
        self.may_load = keys.load


class SchedulerSide:
    """wait_ns: how long a request waits for a hand-over that it was told of. num_workers: a fetch is there when all have it.
    overlap_max: how many tokens are loaded at most while their own step computes. fetched_max: how many are fetched ahead of
    their loads; a request more is begun while there are fewer."""

    def __init__(
        self, shape: Geometry, wait_ns: int, num_workers: int, overlap_max: int, fetched_max: int = 1 << 17
    ) -> None:
        self._shape = shape
        self._wait_ns = wait_ns
        self._num_workers = num_workers
        self._overlap_max = overlap_max
        self._fetched_max = fetched_max
        self._requests: dict[str, _Request] = {}
        self._fetching: dict[int, _Request] = {}
        self._num_fetched = 0
        self._last_number = 0
        self._fetches: list[FetchPlan] = []
        self._dropped: list[int] = []
        self._loads: list[LoadPlan] = []

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: str, keys: RequestKeys) -> None:
        self._requests[request] = _Request(keys)

    def keys(self, request: str) -> RequestKeys | None:
        found = self._requests.get(request)
        return None if found is None else found.keys

    def wants_to_know(self, request: str, num_local: int) -> bool:
        """Whether `match` makes use of what the store has."""
        state = self._requests[request]
        if state.fetch is not None and not self._is_stale(state.fetch, num_local):
            return False
        return self._has_room() if state.may_load else state.keys.save

    def match(self, request: str, num_tokens: int, num_local: int, found: Found, now: int) -> int | None:
        """How many tokens to load beyond the num_local leading ones that vLLM has; None: ask again. num_tokens: all known."""
        state = self._requests[request]
        if state.fetch is not None and self._is_stale(state.fetch, num_local):
            self._drop(state)
        if state.fetch is None:
            return self._begin(request, state, num_tokens, num_local, found, now)
        if state.fetch.num_missing:
            return None
        state.num_local = num_local
        return max(0, min(state.fetch.end, num_tokens - 1) - num_local)

    def is_ahead(self, num_external: int) -> bool:
        """Whether a load of so many tokens comes before the step that computes the others."""
        return num_external > self._overlap_max

    def fetched(self, results: Iterable[tuple[int, int]]) -> None:
        """By number of a fetch, up to which token a worker has it."""
        for number, end in results:
            state = self._fetching.get(number)
            fetch = None if state is None else state.fetch
            if state is None or fetch is None:
                continue
            if end < fetch.end:
                fetch.end = end
                self._lose(state, end)
            fetch.num_missing -= 1

    def allocated(self, request: str, pages: Sequence[int], num_external: int) -> None:
        """vLLM has given the request these pages, the last num_external of its computed tokens to be loaded into them."""
        state = self._requests.get(request)
        if state is None or state.fetch is None:
            return
        if not num_external:
            self._drop(state)
            return
        start = state.num_local
        end = start + num_external
        used = tuple(pages[: self._shape.num_pages(end)])
        self._loads.append(LoadPlan(request, state.fetch.number, start, end, used, self.is_ahead(num_external)))
        self._forget(state, state.fetch)

    def plan_step(self, scheduled: Iterable[Scheduled], preempted: Iterable[str]) -> StepPlans:
        """What the workers do in this step."""
        saves = [plan for each in scheduled if (plan := self._save(each)) is not None]
        plans = StepPlans(
            tuple(self._fetches), tuple(self._dropped), tuple(self._loads), tuple(saves), tuple(preempted)
        )
        self._fetches, self._dropped, self._loads = [], [], []
        return plans

    def finished(self, request: str) -> bool:
        """The request ended, or was aborted. Whether the workers still need its pages, and will say when they do not."""
        state = self._requests.pop(request, None)
        if state is None:
            return False
        if state.fetch is not None:
            self._drop(state)
        return state.saves

    # ------------------------------------------------------------------ inside

    def _begin(
        self, request: str, state: _Request, num_tokens: int, num_local: int, found: Found, now: int
    ) -> int | None:
        if state.may_load and not self._has_room():
            return None
        keys = state.keys
        stored = keys.num_tokens if self._is_whole(keys, found) else found.num_blocks * self._shape.block_tokens
        if state.asked_at is None:
            state.asked_at = now
        if keys.wait and state.may_load and stored < keys.num_tokens and now < state.asked_at + self._wait_ns:
            return None
        if state.saved is None or not state.saves:
            state.saved = stored
        if not state.may_load or min(stored, num_tokens - 1) <= num_local:
            return 0
        self._last_number += 1
        state.fetch = _Fetch(self._last_number, num_local, stored, self._num_workers)
        self._fetching[self._last_number] = state
        self._num_fetched += state.fetch.num_tokens
        self._fetches.append(FetchPlan(self._last_number, num_local, stored, keys.num_tokens, self._objects(keys)))
        return None

    def _has_room(self) -> bool:
        return self._num_fetched < self._fetched_max

    @staticmethod
    def _is_stale(fetch: _Fetch, num_local: int) -> bool:
        """vLLM has evicted meanwhile what came before it."""
        return num_local < fetch.start

    def _drop(self, state: _Request) -> None:
        assert state.fetch is not None
        self._dropped.append(state.fetch.number)
        self._forget(state, state.fetch)

    def _forget(self, state: _Request, fetch: _Fetch) -> None:
        del self._fetching[fetch.number]
        self._num_fetched -= fetch.num_tokens
        state.fetch = None

    def _lose(self, state: _Request, end: int) -> None:
        """What did not come is computed, and saved: the store does not have it."""
        state.may_load = False
        if state.saved is not None and not state.saves:
            state.saved = min(state.saved, self._shape.full_blocks(end) * self._shape.block_tokens)

    def _save(self, part: Scheduled) -> SavePlan | None:
        state = self._requests.get(part.request)
        if state is None or not state.keys.save or state.saved is None:
            return None
        state.pages = [*part.pages] if part.resumed else [*state.pages, *part.pages]
        end = self._savable(state.keys, part.num_computed + part.num_scheduled)
        if end <= state.saved:
            return None
        start, state.saved, state.saves = state.saved, end, True
        pages = tuple(state.pages[: self._shape.num_pages(end)])
        return SavePlan(
            part.request, start, end, self._saved_tokens(state.keys), self._saved_objects(state.keys), pages
        )

    def _savable(self, keys: RequestKeys, num_computed: int) -> int:
        """Of so many computed tokens, how many make whole objects."""
        most = self._saved_tokens(keys)
        return most if num_computed >= most else self._shape.full_blocks(num_computed) * self._shape.block_tokens

    def _saved_tokens(self, keys: RequestKeys) -> int:
        return keys.num_tokens if keys.save_tail else len(keys.blocks) * self._shape.block_tokens

    def _saved_objects(self, keys: RequestKeys) -> tuple[bytes, ...]:
        return self._objects(keys) if keys.save_tail else keys.blocks

    def _is_whole(self, keys: RequestKeys, found: Found) -> bool:
        return found.num_blocks == len(keys.blocks) and (found.tail or not keys.tail)

    def _objects(self, keys: RequestKeys) -> tuple[bytes, ...]:
        return (*keys.blocks, keys.tail) if keys.tail else keys.blocks
