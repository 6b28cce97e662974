"""The ready instances of one kind, by row, in the order in which a placement looks at them: the shortest queue first,
the least loaded batch first. Everything else a placement asks of single instances.

A pool is made anew whenever membership changes; between two changes its rows stay. `Instance` objects have the truth,
and whoever changes one tells its pool. Times are nanoseconds of the Conductor's clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from mooncake.core.messages import NodeInfo
from mooncake.core.throughput import Throughput
from mooncake.core.types import NANOS_PER_MS, InstanceInfo, InstanceLoad, InstanceState, Role, TierLoad
from mooncake.scheduler.prefix_index import FAST, SLOT_BITS, bit_numbers, level_bit, reach_bits
from mooncake.scheduler.tenant_work import TenantWork

if TYPE_CHECKING:
    from mooncake.scheduler.bookings import Booking

_NS_PER_MS = float(NANOS_PER_MS)
_ROWS_OF_MAX = 4096
"""Masks whose rows are remembered."""
_MANY_BITS = 48
"""Masks with more bits than this are of too many holders to be listed."""
_PACE_STEP = 1.5
"""Paces are powers of this: whoever is less off than that is taken to be as its model says."""
_PACE_PRIOR_NS = 50e6
"""Keeps very short prefills from telling much."""
_NUM_RATIOS_MIN, _NUM_RATIOS_MAX = 3, 8
"""Prefills that a pace is told from."""
_BOOKED_NS, _TURN_NS = 1e3, 1e-3
"""What bookings and turns weigh where batches are compared: next to nothing, so that they decide only between
equals."""

Model = tuple[float, float, float]


class Instance:
    """What is known of an instance. Load is known twice: from reports, which lag, and from the books, which know what
    was placed but not how it goes. `Books` alone writes the booked part.

    prefill = a + n (b + 2 c (P + n/2)) for n tokens after P cached ones, with a for each step of step_tokens; decode
    step = a + b B + c ctx; in nanoseconds."""

    __slots__ = (
        "backlog_until", "batch_ns", "booked_until", "busy_until", "connected", "decode", "decoding", "done_at", "held",
        "info", "last_report", "leaving", "load", "num_decodes", "num_prefills", "num_seqs", "num_waiting", "pace", "pending",
        "pending_ns", "pending_pages", "pool", "prefill", "prefill_ns", "prefill_turn", "ratios", "row", "slot",
        "step_tokens", "tenants", "throughput", "turn", "used_pages",
    )  # fmt: skip

    def __init__(self, info: InstanceInfo, slot: int) -> None:
        self.slot = slot
        self.connected = True
        self.held = False
        """Whether an operator wants it to take nothing new."""
        self.pool: Pool | None = None
        """The pool it is in while it is ready, and its row there."""
        self.row = 0

        self.last_report = -1
        """Reported: number of the last report; when prefills that the books do not know will be done; sequences
        running and waiting in the decode batch, what they add to a step, and the share of them that ends per
        nanosecond; pages that they use or wait for; and how many of them wait."""
        self.backlog_until = 0
        self.num_seqs = 0.0
        self.num_waiting = 0
        self.batch_ns = 0.0
        self.leaving = 0.0
        self.used_pages = 0
        self.load: InstanceLoad | None = None
        """All of the last report, and the tokens that it computes: for people."""
        self.throughput = Throughput()

        self.num_prefills = 0
        """Booked: prefills placed and not done, their predicted time, whose they are, and when they will be done one after the
        other; attempts that decode here or will, and whose they are; those of them that no report shows yet, what they will
        add to a step, and pages; number of the last booking of a prefill here, and of a decode."""
        self.prefill_ns = 0
        self.tenants = TenantWork()
        self.booked_until = 0
        self.num_decodes = 0
        self.decoding: Counter[str] = Counter()
        self.pending: dict[Booking, None] = {}
        self.pending_ns = 0.0
        self.pending_pages = 0
        self.prefill_turn = 0
        self.turn = 0
        self.pace = 1.0
        """How many times longer its prefills take than its model says: at least, of those done lately, as many of them take
        longer for other reasons; the time that each took by that expected; when the last was done."""
        self.ratios: deque[float] = deque(maxlen=_NUM_RATIOS_MAX)
        self.done_at = 0
        self.busy_until = 0
        """When all prefill work here will be done, booked or reported."""
        self.set_info(info)

    def set_info(self, info: InstanceInfo) -> None:
        self.info = info
        self.step_tokens = max(1, info.max_step_tokens)
        a, b, c = info.cost.prefill
        a, b, c = a * _NS_PER_MS, b * _NS_PER_MS / 1e3, c * 0.5
        self.prefill = a * self.pace, b * self.pace, c * self.pace
        a, b, c = info.cost.decode
        self.decode = a * _NS_PER_MS, b * _NS_PER_MS, c
        self.pending_ns = sum(self.sequence_ns(booking.num_tokens) for booking in self.pending)

    def prefill_done(self, could_begin_at: int, expected_ns: int, now: int) -> None:
        """expected_ns: 0 if this prefill does not tell how fast the instance computes."""
        taken_ns = now - max(could_begin_at, self.done_at)
        self.done_at = now
        if not expected_ns:
            return
        ratio = (taken_ns + _PACE_PRIOR_NS) / (expected_ns / self.pace + _PACE_PRIOR_NS)
        self.ratios.append(ratio)
        if ratio < _PACE_STEP and self.pace == 1.0:
            return
        least = min(self.ratios) if len(self.ratios) >= _NUM_RATIOS_MIN else 1.0
        pace = _PACE_STEP ** int(math.log(least, _PACE_STEP)) if least >= _PACE_STEP else 1.0
        if pace != self.pace:
            self.pace = pace
            self.set_info(self.info)
            if self.pool is not None:
                self.pool.set_models()

    def sequence_ns(self, num_tokens: int) -> float:
        """What a sequence of so many tokens adds to a decode step."""
        return self.decode[1] + self.decode[2] * num_tokens

    def set_batch(self, num_seqs: float, num_tokens: int, mean_left: float) -> None:
        """What decodes here now. mean_left: tokens that a running sequence has still to come."""
        a, b, c = self.decode
        self.num_seqs = num_seqs
        self.batch_ns = b * num_seqs + c * num_tokens
        self.leaving = 1.0 / (mean_left * (a + self.batch_ns)) if self.batch_ns > 0 else 0.0

    def set_work(self) -> None:
        """Booked or reported prefill work changed."""
        self.busy_until = max(self.booked_until, self.backlog_until)
        if self.pool is not None:
            self.pool.set_work(self)

    @property
    def placeable(self) -> bool:
        return self.connected and not self.held and self.info.state is InstanceState.READY

    @property
    def seen(self) -> InstanceInfo:
        """As frontends are to see it."""
        if self.held and self.info.state is InstanceState.READY:
            return msgspec.structs.replace(self.info, state=InstanceState.DRAINING)
        return self.info

    @property
    def capacity_tokens(self) -> int:
        return self.info.num_pages * self.info.page_tokens

    @property
    def does_prefill(self) -> bool:
        return self.info.role is Role.PREFILL

    @property
    def prefills_in_place(self) -> bool:
        """A decode instance whose role it is."""
        return self.info.role is Role.COLOCATED


class Node:
    __slots__ = ("connected", "info", "slot", "tiers")

    def __init__(self, info: NodeInfo, slot: int) -> None:
        self.info = info
        self.slot = slot
        self.connected = True
        self.tiers: tuple[TierLoad, ...] = ()
        """As last reported: for people."""


class Pool:
    """nodes: slot of each row's store node (0: none); bits: those of it and of the instance that `Match.reach` asks
    for. queue: (busy until, turn, row) of all, ascending: so of those that are free the one that is so for longest
    comes first. load_ns: float64, the decode step with all that is booked. fastest: a model that is nowhere slower
    than any member's. everyone, colocated: bool."""

    def __init__(self, members: Sequence[Instance], node_slot: Callable[[str], int]) -> None:
        self.members = tuple(members)
        self.names = tuple(member.info.name for member in members)
        self.rows = {name: row for row, name in enumerate(self.names)}
        self.everyone = np.ones(len(members), dtype=np.bool_)
        self.colocated = np.array([member.prefills_in_place for member in members], dtype=np.bool_)
        self.num_colocated = int(self.colocated.sum())
        self.capacity = np.array([member.capacity_tokens for member in members], dtype=np.int64)
        self.capacity_min = min(self.capacity.tolist(), default=0)
        self.nodes = [node_slot(member.info.node) for member in members]
        self.bits = [reach_bits(member.slot, node) for member, node in zip(members, self.nodes, strict=True)]
        self.by_node: dict[int, list[int]] = {}
        for row, node in enumerate(self.nodes):
            self.by_node.setdefault(node, []).append(row)
        self.fast_bits = sum(level_bit(member.slot, FAST) for member in members)
        """Those of the prefix index that say one of these instances has a block in its pages."""
        self._row_of_slot = {member.slot: row for row, member in enumerate(members)}
        self._rows_of: dict[int, list[int]] = {}
        self.fastest: Model = (0.0, 0.0, 0.0)
        self.is_uniform = True
        self.set_models()
        self.queue = [(0, 0, row) for row in range(len(members))]
        self._place = list(self.queue)
        self.load_ns = np.zeros(len(members))
        for row, member in enumerate(members):
            member.pool, member.row = self, row
            self.set_work(member)
            self.set_load(member)

    def __len__(self) -> int:
        return len(self.members)

    def rows_of(self, mask: int) -> list[int] | None:
        """Rows whose instance or whose store node has any bit in the mask, ascending; None if there are many
        holders."""
        rows = self._rows_of.get(mask)
        if rows is None:
            if mask.bit_count() > _MANY_BITS:
                return None
            found: dict[int, None] = {}
            for slot in dict.fromkeys((bit_numbers(mask) // SLOT_BITS).tolist()):
                found.update(dict.fromkeys(self.by_node.get(slot, ())))
                if slot in self._row_of_slot:
                    found[self._row_of_slot[slot]] = None
            if len(self._rows_of) >= _ROWS_OF_MAX:
                self._rows_of.clear()
            rows = self._rows_of[mask] = sorted(found)
        return rows

    def set_models(self) -> None:
        """The time model of a member changed."""
        a, b, c = ([member.prefill[at] for member in self.members] for at in range(3))
        self.fastest = min(a, default=0.0), min(b, default=0.0), min(c, default=0.0)
        self.is_uniform = all(member.prefill == self.fastest for member in self.members)

    def set_work(self, member: Instance) -> None:
        """The prefill work of that member changed."""
        row = member.row
        before = self._place[row]
        place = (member.busy_until, member.prefill_turn, row)
        if place != before:
            queue = self.queue
            del queue[bisect_left(queue, before)]
            insort(queue, place)
            self._place[row] = place

    def set_load(self, member: Instance) -> None:
        """The decode batch of that member changed, or what is booked there."""
        tie_ns = _BOOKED_NS * member.num_decodes + _TURN_NS * member.turn
        self.load_ns[member.row] = member.decode[0] + member.batch_ns + member.pending_ns + tie_ns

    @property
    def mean_idle_ns(self) -> float:
        """The mean decode step with empty batches; the pool must not be empty."""
        return sum([member.decode[0] for member in self.members]) / len(self.members)

    @property
    def mean_batch_ns(self) -> float:
        """What the batches as they are now add to it on average."""
        return sum([member.batch_ns for member in self.members]) / len(self.members)
