"""What the engine core knows of one sequence, and the batch of those that decode.

A decoding sequence grows by one token in every step, and so do all others of the batch. So the batch counts steps, once, and a
member keeps the difference: its tokens are `offset + clock`. A step, or a run of many, then costs nothing for each member. What
will concern a single member (its pages run out, its limit is reached, a block of it is complete) happens at a clock that is
known when it joins, and waits in a heap.

    clock              0    1    2    3    4    5
    member of offset 7      8    9   10   11   12  tokens
    member of offset 3 joins at 3:    6    7    8
"""

from __future__ import annotations

import enum
import heapq

import numpy as np

from mooncake.core.types import Job

Order = tuple[int, int, int]
"""(turn among tenants, -priority, number of submission): who comes first is admitted first and preempted last."""


class State(enum.IntEnum):
    WAITING = 0
    LOADING = 1
    RUNNING = 2
    """It has pages; tokens are still to be prefilled, or it joins the decode batch with the next plan."""
    DECODING = 3
    ENDED = 4


class Sequence:
    """num_tokens: known tokens; of a member of the decode batch, ask the batch. told: position of the first token that was not
    passed on yet. due: the clock at which the batch wants to look at it. stored_tokens: leading ones that the sink has.
    cached_tokens: leading ones that need not be computed, of which own_tokens were in pages. ssd_tokens: of the source's."""

    __slots__ = (
        "cached_tokens", "computed", "due", "in_step", "job", "keys", "loading", "loading_keys", "num_published", "num_tokens",
        "offset", "one_token", "order", "own_tokens", "page_array", "seq", "source_tokens", "ssd_tokens", "started", "state",
        "stored_tokens", "storing", "told", "told_cached", "wants_store",
    )  # fmt: skip

    def __init__(
        self,
        seq: int,
        job: Job,
        order: Order,
        source_tokens: int,
        ssd_tokens: int,
        one_token: bool,
        store: bool,
        stored_tokens: int,
    ) -> None:
        self.seq = seq
        self.job = job
        self.order = order
        self.source_tokens = source_tokens
        self.ssd_tokens = ssd_tokens
        self.one_token = one_token
        self.wants_store = store
        self.stored_tokens = stored_tokens
        self.keys = job.block_keys
        self.num_tokens = self.told = job.num_tokens
        self.state = State.WAITING
        self.computed = 0
        self.offset = 0
        self.due: int | None = None
        self.num_published = 0
        self.cached_tokens = self.own_tokens = 0
        self.started = False
        self.told_cached = False
        self.in_step = False
        self.loading = False
        self.loading_keys: tuple[bytes, ...] = ()
        self.storing = 0
        self.page_array: np.ndarray | None = None

    @property
    def busy(self) -> bool:
        """Whether somebody reads or writes its pages; of a member of the decode batch, every step does."""
        return self.in_step or self.loading or self.storing > 0

    @property
    def remaining(self) -> int:
        """Known tokens that are not computed; not asked of members of the decode batch."""
        return self.num_tokens - self.computed


class DecodeBatch:
    def __init__(self) -> None:
        self.clock = 0
        self.members: dict[int, Sequence] = {}
        self._sum_offsets = 0
        self._due: list[tuple[int, Order, int]] = []
        """An entry counts as long as its sequence is a member that is due then."""

    def num_tokens(self, state: Sequence) -> int:
        return state.offset + self.clock

    @property
    def context_tokens(self) -> int:
        """Known tokens of all members."""
        return self._sum_offsets + len(self.members) * self.clock

    def join(self, state: Sequence) -> None:
        """All its tokens but the last are computed."""
        state.offset = state.num_tokens - self.clock
        self.members[state.seq] = state
        self._sum_offsets += state.offset

    def leave(self, state: Sequence) -> None:
        del self.members[state.seq]
        self._sum_offsets -= state.offset
        state.num_tokens = state.offset + self.clock
        state.computed = state.num_tokens - 1

    def set_due(self, state: Sequence, clock: int) -> None:
        state.due = clock
        heapq.heappush(self._due, (clock, state.order, state.seq))

    def take_due(self) -> list[Sequence]:
        """Members that want to be looked at now, in order."""
        found: list[Sequence] = []
        while self._due and self._due[0][0] <= self.clock:
            clock, _, seq = heapq.heappop(self._due)
            state = self.members.get(seq)
            if state is not None and state.due == clock:
                state.due = None
                found.append(state)
        return found

    @property
    def horizon(self) -> int:
        """Steps until somebody is due; there must be members."""
        while True:
            clock, _, seq = self._due[0]
            state = self.members.get(seq)
            if state is not None and state.due == clock:
                return clock - self.clock
            heapq.heappop(self._due)

    def check_integrity(self) -> None:
        assert self._sum_offsets == sum(state.offset for state in self.members.values()), "offsets do not add up"
        line = {(clock, seq) for clock, _, seq in self._due}
        assert all((state.due, seq) in line for seq, state in self.members.items()), "a member is in no line"
