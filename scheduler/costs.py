"""Predicted times, in nanoseconds. Nothing here has side effects.

TTFT = queue + load + prefill
queue    until the work booked or reported there is done, one request after the other
load     of the reused blocks that are not in the instance's own pages: bytes over the bandwidth of where they lie,
         after what is booked on the links of their way and will not have passed when the queue is done
prefill  n (b + 2 c (P + n/2)) for n computed tokens after P reused ones, so n (b + c (2 P + n)), and a for each step
         that they are computed in
TBT      a + b B + c ctx, the step time of the decode batch with this request's choices in it, when its prefill will end

KV is loaded layer by layer while the layers before are computed. So where a policy says that loads are *hidden*, a
load costs only by how much it is longer than the prefill; the paper's formula adds it whole. What only an ssd has is
read into memory before, and never hidden.

Instances are priced one after the other, best prospects first, and most need not be looked at: so a placement costs
about the same among ten and among a thousand.
"""

from __future__ import annotations

import math

import msgspec

from mooncake.core.types import NANOS_PER_S
from mooncake.scheduler.config import Rates
from mooncake.scheduler.links import Links
from mooncake.scheduler.pools import Instance, Pool
from mooncake.scheduler.prefix_index import FAST, SLOT_BITS, Match, bit_numbers

LOCAL, PULL, RECOMPUTE = "local", "pull", "recompute"
"""Ways to prefill: reuse what the instance and its own node have, or will have when the request's turn comes; reuse
what one other node has; reuse only what is in the instance's own pages."""

_SOURCES_MAX = 3
"""Runs looked at for a source: with a shorter one from a less busy node there is less to gain each time."""
_HOLDERS_MAX = 16
"""Nodes compared that have the same run: enough to find a free one."""


class BlockCosts:
    """Nanoseconds to load one block with the way to itself, by where it lies. Remote comes on top of dram being read
    there, so it is the slower of both. nic_ns: of one on a NIC alone."""

    __slots__ = ("_rates", "dram_ns", "nic_ns", "num_bytes", "remote_ns", "ssd_ns", "token_bytes", "tokens")

    def __init__(self, block_tokens: int, kv_token_bytes: int, rates: Rates) -> None:
        self.tokens = block_tokens
        self._rates = rates
        self.set_token_bytes(kv_token_bytes)

    def set_token_bytes(self, token_bytes: int) -> None:
        """What the instances of the cluster say that KV of one token is."""
        rates = self._rates
        self.token_bytes = token_bytes
        self.num_bytes = self.tokens * token_bytes
        block_ns = self.num_bytes * NANOS_PER_S
        self.dram_ns = block_ns / rates.dram_bytes_per_s
        self.nic_ns = block_ns / rates.nic_bytes_per_s
        self.ssd_ns = block_ns / rates.ssd_bytes_per_s
        self.remote_ns = block_ns / min(rates.remote_bytes_per_s, rates.nic_bytes_per_s, rates.dram_bytes_per_s)


# ---------------------------------------------------------------- prefill


class Source(msgspec.Struct, frozen=True, gc=False):
    """A store node to pull from: its slot, the leading blocks it has, and how many of them only its ssd has."""

    slot: int
    num_blocks: int
    num_slow: int


class Offer(msgspec.Struct, gc=False):
    """What prefill would take at one instance in one way: reuse the leading `blocks`, num_slow of them from an ssd.

    own, expected: leading blocks in its pages now, and when the work before this request is done. cost: what is
    compared. others: ways that cost more there."""

    row: int
    way: str
    own: int
    expected: int
    blocks: int
    num_slow: int
    queue_ns: int
    load_ns: float
    prefill_ns: float
    ttft_ns: float
    cost_ns: float
    others: tuple[Offer, ...] = ()


class PrefillPrices(msgspec.Struct, gc=False):
    """Of one request, at every instance of a pool. hidden: whether loads are. work_weight: what work, which is load
    and prefill together, counts beside TTFT. threshold: if given, the source is taken just where it has that many
    times what is there, as in the paper's Algorithm 1."""

    pool: Pool
    match: Match
    num_tokens: int
    source: Source | None
    links: Links
    costs: BlockCosts
    now: int
    hidden: bool = False
    work_weight: float = 0.0
    threshold: float | None = None

    def offer(self, row: int) -> Offer:
        """The best way at that instance."""
        pool, costs, source = self.pool, self.costs, self.source
        member = pool.members[row]
        own, expected, stored = self.match.reach(pool.bits[row])
        queue = member.busy_until - self.now
        if queue < 0:
            queue = -queue if member.num_prefills else 0  # what is overdue is expected to take as long again
        blocks = max(expected, stored)
        load, num_slow = (blocks - own) * costs.dram_ns, 0
        if self.match.any_slow:
            load, num_slow = self._with_slow(pool.nodes[row], blocks, expected, load, queue)
        best = self._offer(LOCAL, member, own, expected, blocks, num_slow, queue, load)
        if source is not None and source.slot != pool.nodes[row] and source.num_blocks > own:
            load, num_slow = self._pull_ns(pool.nodes[row], own, source, queue), source.num_slow
            pull = self._offer(PULL, member, own, expected, source.num_blocks, num_slow, queue, load)
            best = self._better(best, pull)
        if self.hidden and best.ttft_ns > best.queue_ns + best.prefill_ns:
            recompute = self._offer(RECOMPUTE, member, own, expected, own, 0, queue, 0.0)
            best = _first_of(best, recompute) if best.cost_ns <= recompute.cost_ns else _first_of(recompute, best)
        return best

    def _offer(
        self,
        way: str,
        member: Instance,
        own: int,
        expected: int,
        blocks: int,
        num_slow: int,
        queue: int,
        load: float,
    ) -> Offer:
        a, b, c = member.prefill
        whole, reused = self.num_tokens, blocks * self.costs.tokens
        new = whole - reused
        if new > member.step_tokens:
            a *= -(-new // member.step_tokens)
        prefill = a + new * (b + c * (whole + reused))
        read = self.read_ns(load, num_slow)
        work = read + max(load - read, prefill) if self.hidden else load + prefill
        ttft = queue + work
        cost = ttft + self.work_weight * work
        return Offer(member.row, way, own, expected, blocks, num_slow, queue, load, prefill, ttft, cost)

    def read_ns(self, load: float, num_slow: int) -> float:
        """How much of a load is reading so many blocks from an ssd."""
        return min(load, num_slow * self.costs.ssd_ns) if num_slow else 0.0

    def _better(self, local: Offer, pull: Offer) -> Offer:
        if self.threshold is None:
            pulls = pull.cost_ns < local.cost_ns
        else:
            pulls = pull.blocks > max(local.blocks * self.threshold, local.blocks)
        return _first_of(pull, local) if pulls else _first_of(local, pull)

    def _with_slow(self, node: int, blocks: int, expected: int, load: float, queue: int) -> tuple[float, int]:
        """The load when what is only on the node's ssd comes from there, and how many blocks that are."""
        num_slow = max(0, blocks - max(expected, self.match.length(node, FAST)))
        if not num_slow:
            return load, 0
        wait = max(0.0, self.links.ssd_until[node] - self.now - queue)
        return load + wait + num_slow * (self.costs.ssd_ns - self.costs.dram_ns), num_slow

    def _pull_ns(self, node: int, own: int, source: Source, queue: int) -> float:
        links, costs, num_slow = self.links, self.costs, source.num_slow
        load = (source.num_blocks - own) * costs.remote_ns + num_slow * costs.ssd_ns
        begins = self.now + queue
        if links.busy_until <= begins:
            return load
        busy = max(links.out_until[source.slot], links.in_until[node])
        if num_slow:
            busy = max(busy, links.ssd_until[source.slot])
        return load + max(0.0, busy - begins)

    def bounds(self, blocks: int) -> tuple[float, float, float]:
        """For instances that have at most so many of the leading blocks, no cost is less than the queue plus the first
        number. The same goes for a pull after the queue plus the second, and after the time when its source is free,
        the third. All of that grows with the queue, so nobody with a longer queue costs less either."""
        source, whole, block_tokens = self.source, self.num_tokens, self.costs.tokens
        a, b, c = self.pool.fastest
        factor = 1.0 + self.work_weight
        reused = blocks * block_tokens
        local = factor * (a + (whole - reused) * (b + c * (whole + reused)))
        if source is None or source.num_blocks <= blocks:
            return local, local, 0.0
        load = (source.num_blocks - blocks) * self.costs.remote_ns
        reused = source.num_blocks * block_tokens
        prefill = a + (whole - reused) * (b + c * (whole + reused))
        if not self.hidden:
            load = prefill = load + prefill
        free_at = self.links.out_until[source.slot] - self.now
        most = max(load, prefill)
        return local, factor * most, free_at + load + self.work_weight * most


def _first_of(best: Offer, other: Offer) -> Offer:
    best.others = (*best.others, other, *other.others)
    other.others = ()
    return best


def find_source(
    match: Match, node_bits: int, pool: Pool, links: Links, costs: BlockCosts, now: int, *, longest: bool = False
) -> Source | None:
    """The store node whose blocks save most, by the time model of the pool's first instance; with `longest` simply the
    one with the longest match. Of several equal ones that with the least booked on its NIC."""
    best: Source | None = None
    least = 0.0
    num_tried = 0
    for length, mask in reversed(match.steps):
        holders = mask & node_bits
        if not holders:
            continue
        slot = _least_busy(holders, links, now)
        num_slow = length - match.length(slot, FAST) if match.any_slow else 0
        wait = links.out_until[slot] - now
        if longest or (best is None and wait <= 0.0):
            return Source(slot, length, num_slow)
        a, b, c = pool.members[0].prefill
        b += a / pool.members[0].step_tokens
        tokens = length * costs.tokens
        price = max(0.0, wait) + length * costs.remote_ns - tokens * (b + tokens * c)
        if best is None or price < least:
            best, least = Source(slot, length, num_slow), price
        num_tried += 1
        if wait <= 0.0 or num_tried >= _SOURCES_MAX:
            break
    return best


def _least_busy(holders: int, links: Links, now: int) -> int:
    """holders: bits of level ANY."""
    if not holders & (holders - 1) or links.busy_until <= now:
        return (holders.bit_length() - 1) // SLOT_BITS
    slots: list[int] = (bit_numbers(holders) // SLOT_BITS).tolist()
    return min(slots[:_HOLDERS_MAX], key=links.out_until.__getitem__)


# ---------------------------------------------------------------- decode


class Batch(msgspec.Struct, gc=False):
    """One decode instance at the time when a request joins it. num_seqs: without the request; tbt: step time with it.
    handover: until its KV is there. cost: what is compared."""

    row: int
    num_seqs: float
    tbt_ns: float
    handover_ns: float
    cost_ns: float


class DecodePrices(msgspec.Struct, gc=False):
    """Of one request, at every instance of a pool. num_tokens, num_output: of each choice.

    cost = hand-over + tbt_weight * TBT. The hand-over takes near_ns to instances on the node where the KV will be, and
    far_ns to others when no link is busy; with node 0 it is not looked at."""

    pool: Pool
    num_tokens: int
    num_output: int
    num_choices: int
    joins_at: int
    links: Links
    now: int
    tbt_weight: float = 1.0
    node: int = 0
    near_ns: float = 0.0
    far_ns: float = 0.0

    def batch(self, row: int) -> Batch:
        """Of what runs now, the share that is likely to have ended by then is gone; of what is booked there, that is
        added which will have joined."""
        member, joins_at = self.pool.members[row], self.joins_at
        num_seqs, batch_ns = member.num_seqs, member.batch_ns
        if batch_ns and joins_at > self.now:
            staying = math.exp((self.now - joins_at) * member.leaving)
            num_seqs *= staying
            batch_ns *= staying
        for booking in member.pending:
            if booking.joins_at <= joins_at:
                num_seqs += 1
                batch_ns += booking.sequence_ns
        a, b, c = member.decode
        tbt = a + batch_ns + self.num_choices * (b + c * self.num_tokens)
        handover = self._handover_ns(row) if self.node else 0.0
        return Batch(row, num_seqs, tbt, handover, handover + self.tbt_weight * tbt)

    def _handover_ns(self, row: int) -> float:
        node = self.pool.nodes[row]
        if node == self.node:
            return self.near_ns
        links, joins_at = self.links, self.joins_at
        if links.busy_until <= joins_at:
            return self.far_ns
        return self.far_ns + max(0.0, links.out_until[self.node] - joins_at, links.in_until[node] - joins_at)

    def fits(self, batch: Batch) -> bool:
        """Whether it has room, and the pages suffice for the expected length."""
        member, joins_at = self.pool.members[batch.row], self.joins_at
        info = member.info
        if batch.num_seqs + self.num_choices > info.max_batch:
            return False
        used = num_pages(self.num_tokens, self.num_output, self.num_choices, info.page_tokens)
        if used + member.used_pages + member.pending_pages <= info.num_pages:
            return True
        used += sum([booking.num_pages for booking in member.pending if booking.joins_at <= joins_at])
        staying = math.exp(min(0, self.now - joins_at) * member.leaving)
        return used + member.used_pages * staying <= info.num_pages


def sibling_pages(num_output: int, page_tokens: int) -> int:
    """What another choice needs beside the prompt's whole pages, which the first one has: its own output, and a copy of
    the last, partial page."""
    return 1 + -(-num_output // page_tokens)


def num_pages(num_tokens: int, num_output: int, num_choices: int, page_tokens: int) -> int:
    pages = -(-(num_tokens + num_output) // page_tokens)
    if num_choices > 1:
        pages += (num_choices - 1) * sibling_pages(num_output, page_tokens)
    return pages
