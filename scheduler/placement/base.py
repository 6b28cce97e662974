"""What all policies share: the question, the answer, who may be asked, the search for a prefill instance, the choice
of a decode instance, and how ties are broken.
"""

from __future__ import annotations

import math
import random
from typing import Protocol

import msgspec
import numpy as np

from mooncake.core.messages import Prediction
from mooncake.core.types import NANOS_PER_MS, Slo
from mooncake.scheduler.bookings import Books
from mooncake.scheduler.costs import (
    PULL,
    RECOMPUTE,
    Batch,
    BlockCosts,
    DecodePrices,
    Offer,
    PrefillPrices,
)
from mooncake.scheduler.pools import Instance, Pool
from mooncake.scheduler.prefix_index import Match
from mooncake.scheduler.view import View

TIE_NS = NANOS_PER_MS
"""Costs closer than this are equal: the estimate is no better, and spreading is worth more."""


_LOOK_AT = 2
"""Decode instances that are priced where links are busy; elsewhere the one with the least booked is taken. To price
more of them was seen to gain nothing: the order by what is booked is nearly that of the prices."""


class Ask(msgspec.Struct, gc=False):
    """One placement question. `num_output`: output tokens expected still to come, of each choice."""

    num_tokens: int
    num_output: int
    match: Match
    exclude: tuple[str, ...] = ()
    decode_only: bool = False
    num_choices: int = 1
    slo: Slo = Slo()


class Known(msgspec.Struct, frozen=True):
    """What a policy decides by, beside the question and the time."""

    view: View
    books: Books
    costs: BlockCosts


class Offers(msgspec.Struct, gc=False):
    """Prefill as it was priced: at these instances; at the others it costs `at_least_ns`, if they were looked for at
    all."""

    prices: PrefillPrices
    priced: list[Offer]
    chosen: Offer
    at_least_ns: float | None = None


class Batches(msgspec.Struct, gc=False):
    """Decode as it was priced: at these instances; at the others more is booked."""

    prices: DecodePrices
    priced: list[Batch]
    chosen: Batch


class Decision(msgspec.Struct, gc=False):
    """What was chosen, and the numbers behind the choice, kept for the record.

    prefill is None if only decode was asked for; it is decode itself if that instance prefills in place. source: slot
    of the store node to load from, or 0, with the number of leading blocks to take from it; num_loaded of them are
    not in the instance's pages, and num_slow come from an ssd.

    others: prefill of the other kind, if it was considered: in place beside the prefill pool, or in the pool beside in
    place."""

    prefill: Instance | None
    decode: Instance
    prediction: Prediction
    batches: Batches
    source: int = 0
    num_source_blocks: int = 0
    num_loaded: int = 0
    num_slow: int = 0
    offers: Offers | None = None
    others: Offers | None = None


class Policy(Protocol):
    name: str

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        """None if no ready instances can take it."""
        ...


# ---------------------------------------------------------------- who may be asked


class Candidates(msgspec.Struct):
    """The rows of two pools for which the mask is true. In place: both are the same colocated instances."""

    prefill: Pool
    prefill_mask: np.ndarray
    decode: Pool
    decode_mask: np.ndarray
    in_place: bool = False


def find_candidates(view: View, ask: Ask) -> Candidates | None:
    """Colocated instances prefill in place only if there is no ready prefill instance that could take the request."""
    prefill, decode = view.pools
    if ask.num_tokens <= view.fits_everywhere and not ask.exclude and not ask.decode_only:
        return Candidates(prefill, prefill.everyone, decode, decode.everyone)
    # Decode needs room for the next token, prefill does not.
    targets = _narrow(decode, decode.everyone, ask.num_tokens + 1, ask.exclude)
    if targets is None:
        return None
    if ask.decode_only:
        return Candidates(decode, targets, decode, targets)
    sources = _narrow(prefill, prefill.everyone, ask.num_tokens, ask.exclude)
    if sources is not None:
        return Candidates(prefill, sources, decode, targets)
    both = _narrow(decode, decode.colocated, ask.num_tokens + 1, ask.exclude) if decode.num_colocated else None
    return Candidates(decode, both, decode, both, in_place=True) if both is not None else None


def _narrow(pool: Pool, mask: np.ndarray, num_tokens: int, exclude: tuple[str, ...]) -> np.ndarray | None:
    """Without those too small, and without the excluded ones unless nothing else is left. None if nobody is left."""
    if num_tokens <= pool.capacity_min and not exclude:
        return mask
    if not len(pool):
        return None
    if num_tokens > pool.capacity_min:
        mask = mask & (pool.capacity >= num_tokens)
        if not mask.any():
            return None
    if exclude:
        kept = mask.copy()
        kept[[pool.rows[name] for name in exclude if name in pool.rows]] = False
        mask = kept if kept.any() else mask
    return mask


# ---------------------------------------------------------------- prefill


def find_free_holder(prices: PrefillPrices, match: Match, mask: np.ndarray) -> Offers | None:
    """An instance that has the longest run, is free, and loads no longer than it computes, if all compute alike: nobody can
    cost less. The short way of `find_cheapest`, which needs no source."""
    pool = prices.pool
    rows = pool.rows_of(match.steps[-1][1]) if match.steps and pool.is_uniform else None
    for row in rows or ():
        member = pool.members[row]
        if member.busy_until <= prices.now and not member.num_prefills and (mask is pool.everyone or mask[row]):
            offer = prices.offer(row)
            if offer.blocks == match.steps[-1][0] and offer.load_ns <= offer.prefill_ns:
                return Offers(prices, [offer], offer, offer.cost_ns)
    return None


def find_cheapest(prices: PrefillPrices, match: Match, mask: np.ndarray) -> Offers:
    """First those that have more of the prefix than most, then the others in the order of their queues, until no more of
    them can cost less."""
    pool, now = prices.pool, prices.now
    priced, num_blocks = _price_holders(prices, match, mask)
    least = min([offer.cost_ns for offer in priced]) if priced else math.inf
    local, pull, free = prices.bounds(num_blocks)
    seen = [offer.row for offer in priced]
    at_least = 0.0
    for busy_until, _turn, row in pool.queue:
        queue = busy_until - now if busy_until > now else 0
        at_least = min(queue + local, max(queue + pull, free))
        if at_least >= least:
            break
        if row not in seen and (mask is pool.everyone or mask[row]):
            offer = prices.offer(row)
            priced.append(offer)
            least = min(least, offer.cost_ns)
    return Offers(prices, priced, pick(priced, least, pool), at_least)


def _price_holders(prices: PrefillPrices, match: Match, mask: np.ndarray) -> tuple[list[Offer], int]:
    """Those that have long runs, longest first, and how many blocks the others have at most."""
    pool = prices.pool
    everyone = mask is pool.everyone
    priced: list[Offer] = []
    seen: list[int] = []
    for length, holders in reversed(match.steps):
        rows = pool.rows_of(holders)
        if rows is None:
            return priced, length
        for row in rows:
            if row not in seen:
                seen.append(row)
                if everyone or mask[row]:
                    priced.append(prices.offer(row))
    return priced, 0


def pick(offers: list[Offer], least: float, pool: Pool) -> Offer:
    """Of those that cost next to the least, the one with the least booked; of these the one not chosen for longest."""
    near = [offer for offer in offers if offer.cost_ns <= least + TIE_NS] if len(offers) > 1 else offers
    if len(near) == 1:
        return near[0]
    members = pool.members
    return min(near, key=lambda offer: (_num_booked(members[offer.row]), members[offer.row].prefill_turn))


def _num_booked(member: Instance) -> int:
    return member.num_prefills + member.num_decodes


# ---------------------------------------------------------------- decode


def find_batch(prices: DecodePrices, mask: np.ndarray) -> Batches:
    """Of the instances with the least booked, and those on the node where the KV will be, the one that costs least and
    has room. If none of them has, of all that have; without room anywhere, the shortest line."""
    pool = prices.pool
    load = pool.load_ns if mask is pool.everyone else np.where(mask, pool.load_ns, np.inf)
    if prices.links.busy_until > prices.joins_at and len(load) > _LOOK_AT:
        rows: list[int] = load.argpartition(_LOOK_AT)[:_LOOK_AT].tolist()
    else:
        rows = [int(load.argmin())]
    if prices.node in pool.by_node:
        worth = load.item(rows[0]) + (prices.far_ns - prices.near_ns) / prices.tbt_weight
        for row in pool.by_node[prices.node]:
            if load.item(row) <= worth and row not in rows:
                rows.append(row)
    priced = [prices.batch(row) for row in rows if mask is pool.everyone or mask[row]]
    chosen = priced[0]
    for batch in priced[1:]:
        if batch.cost_ns < chosen.cost_ns or (batch.cost_ns == chosen.cost_ns and load[batch.row] < load[chosen.row]):
            chosen = batch
    if not prices.fits(chosen):
        priced = [prices.batch(row) for row in mask.nonzero()[0].tolist()]
        roomy = [batch for batch in priced if prices.fits(batch)]
        if roomy:
            chosen = min(roomy, key=lambda batch: (batch.cost_ns, load[batch.row]))
        else:
            chosen = min(priced, key=lambda batch: (batch.num_seqs, load[batch.row]))
    return Batches(prices, priced, chosen)


# ---------------------------------------------------------------- the decision


class ChoosePrefill(Protocol):
    def __call__(self, ask: Ask, candidates: Candidates, now: int, rng: random.Random) -> Offers: ...


def decide(known: Known, ask: Ask, choose_prefill: ChoosePrefill, now: int, rng: random.Random) -> Decision | None:
    """Prefill as the policy says, then the decode instance with the shortest step when the prefill will end."""
    candidates = find_candidates(known.view, ask)
    if candidates is None:
        return None
    if ask.decode_only:
        return decide_decode_only(known, ask, candidates, now)
    offers = choose_prefill(ask, candidates, now, rng)
    prices = decode_prices(known, ask, candidates, now + int(offers.chosen.ttft_ns), now)
    if candidates.in_place:
        return conclude(offers, alone(prices, offers.chosen.row))
    return conclude(offers, find_batch(prices, candidates.decode_mask))


def local_prices(known: Known, ask: Ask, candidates: Candidates, now: int) -> PrefillPrices:
    """With what each instance or its own node has."""
    return PrefillPrices(candidates.prefill, ask.match, ask.num_tokens, None, known.view.links, known.costs, now)


def decode_prices(known: Known, ask: Ask, candidates: Candidates, joins_at: int, now: int) -> DecodePrices:
    links = known.view.links
    return DecodePrices(candidates.decode, ask.num_tokens, ask.num_output, ask.num_choices, joins_at, links, now)


def alone(prices: DecodePrices, row: int) -> Batches:
    """Nothing to choose."""
    batch = prices.batch(row)
    return Batches(prices, [batch], batch)


def decide_decode_only(known: Known, ask: Ask, candidates: Candidates, now: int) -> Decision:
    batches = find_batch(decode_prices(known, ask, candidates, now, now), candidates.decode_mask)
    member = candidates.decode.members[batches.chosen.row]
    return Decision(None, member, Prediction(tbt_ns=int(batches.chosen.tbt_ns)), batches)


def conclude(offers: Offers, batches: Batches) -> Decision:
    """The decision for what was chosen: source and prediction follow from it."""
    prices, offer, batch = offers.prices, offers.chosen, batches.chosen
    queue_ns, prefill_ns = offer.queue_ns, int(offer.prefill_ns)
    load_ns = max(0, int(offer.ttft_ns) - queue_ns - prefill_ns)
    decision = Decision(
        prices.pool.members[offer.row],
        batches.prices.pool.members[batch.row],
        Prediction(queue_ns, load_ns, prefill_ns, queue_ns + load_ns + prefill_ns, int(batch.tbt_ns)),
        batches,
        offers=offers,
    )
    num_loaded = offer.blocks - offer.own
    if num_loaded and offer.way is not RECOMPUTE:
        source = prices.source
        node = source.slot if source is not None and offer.way is PULL else prices.pool.nodes[offer.row]
        if node:
            decision.source, decision.num_source_blocks = node, offer.blocks
            decision.num_loaded, decision.num_slow = num_loaded, offer.num_slow
    return decision
