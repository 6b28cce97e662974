"""The connector in vLLM's scheduler, decided: what each request loads and saves.

    known --match--> waiting --allocated--> loading --loaded--> computing --finished--> gone
                       |                                            ^
                       +--------------- nothing to load ------------+

Rules:
* Of what the store has, all is loaded that vLLM's own cache lacks, but for the prompt's last token: its logits give the next.
* A load that failed is not tried again: the request computes what is missing.
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
from mooncake.engine.vllm.plans import LoadPlan, SavePlan, StepPlans
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


class _Request:
    __slots__ = ("asked_at", "keys", "may_load", "num_local", "pages", "saved", "saves")

    def __init__(self, keys: RequestKeys) -> None:
        self.keys = keys
        self.asked_at: int | None = None
        self.num_local = 0
        self.pages: list[int] = []
        self.saved: int | None = None
        """Up to here the store has it, or is being given it; None: not known yet."""
        self.saves = False
        self.may_load = keys.load


class SchedulerSide:
    """wait_ns: how long a request waits for a hand-over that it was told of."""

    def __init__(self, shape: Geometry, wait_ns: int) -> None:
        self._shape = shape
        self._wait_ns = wait_ns
        self._requests: dict[str, _Request] = {}
        self._loads: list[LoadPlan] = []
        self._loading: dict[str, tuple[int, ...]] = {}
        """The pages of loads under way."""

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: str, keys: RequestKeys) -> None:
        self._requests[request] = _Request(keys)

    def keys(self, request: str) -> RequestKeys | None:
        found = self._requests.get(request)
        return None if found is None else found.keys

    def wants_to_know(self, request: str) -> bool:
        """Whether what the store has makes a difference."""
        found = self._requests.get(request)
        return found is not None and (found.may_load or found.keys.save)

    def match(self, request: str, num_tokens: int, num_local: int, found: Found, now: int) -> int | None:
        """How many tokens to load beyond the num_local leading ones that vLLM has; None: ask again. num_tokens: all known."""
        state = self._requests[request]
        keys = state.keys
        stored = keys.num_tokens if self._is_whole(keys, found) else found.num_blocks * self._shape.block_tokens
        if state.asked_at is None:
            state.asked_at = now
        if keys.wait and state.may_load and stored < keys.num_tokens and now < state.asked_at + self._wait_ns:
            return None
        state.num_local = num_local
        if state.saved is None or not state.saves:
            state.saved = stored
        return max(0, min(stored, num_tokens - 1) - num_local) if state.may_load else 0

    def allocated(self, request: str, pages: Sequence[int], num_external: int) -> None:
        """vLLM has given the request these pages, the last num_external of its computed tokens to be loaded into them."""
        state = self._requests.get(request)
        if state is None or not num_external:
            return
        start, keys = state.num_local, state.keys
        used = tuple(pages[: self._shape.num_pages(start + num_external)])
        self._loads.append(LoadPlan(request, start, start + num_external, keys.num_tokens, self._objects(keys), used))
        self._loading[request] = used[start // self._shape.page_tokens :]

    def plan_step(self, scheduled: Iterable[Scheduled], preempted: Iterable[str]) -> StepPlans:
        """What the workers do in this step. Requests that load are in none."""
        saves = [plan for each in scheduled if (plan := self._save(each)) is not None]
        loads, self._loads = self._loads, []
        return StepPlans(tuple(loads), tuple(saves), tuple(preempted))

    def loaded(self, requests: Iterable[str], failed_pages: Iterable[int]) -> None:
        """These loads are over in all workers. For these pages nothing came in one of them; others may still be loading."""
        failed = frozenset(failed_pages)
        for request, pages in self._loading.items() if failed else ():
            state = self._requests.get(request)
            if state is not None and not failed.isdisjoint(pages):
                self._lose(state, pages, failed)
        for request in requests:
            self._loading.pop(request, None)

    def finished(self, request: str) -> bool:
        """The request ended, or was aborted. Whether the workers still need its pages, and will say when they do not."""
        state = self._requests.pop(request, None)
        return state is not None and state.saves

    # ------------------------------------------------------------------ inside

    def _lose(self, state: _Request, pages: Sequence[int], failed: frozenset[int]) -> None:
        """What did not come is computed, and saved: the store does not have it."""
        state.may_load = False
        first = next(at for at, page in enumerate(pages) if page in failed)
        came = state.num_local + first * self._shape.page_tokens
        if state.saved is not None and not state.saves:
            state.saved = min(state.saved, self._shape.full_blocks(came) * self._shape.block_tokens)

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
