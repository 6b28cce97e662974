"""Joint: the least predicted cost over prefill instance, decode instance and KV source. Ours.

    cost = TTFT + work_weight * work + hand-over + expected output * TBT

work is what loading and computing occupy the prefill instance for, a cost to those who come later; TTFT = queue +
work. At each instance the cheapest of three ways is taken: reuse what is there or will be when the work before it is
done (to *wait* for a prefix that is being computed there is part of it), *pull* a longer prefix from another node,
*recompute* what would take longer to load. Links are contended, so a busy source is paid for, and of several the one
that saves most is taken.

The terms of prefill and of decode are scored apart: the best prefill instance first, then the decode instance that
suits it, when its batch is as it will be at that time. An objective counts more than the sum: where the cheapest
instance would break it and another would not, the other is taken.

A short rest of a prompt, whose prefix a decode instance has in its pages, may be prefilled there *in place*. That
delays each sequence of the batch once by the time it takes; it is done where this sum is the smaller one and no gap
breaks the TBT objective.
"""

from __future__ import annotations

import random

from mooncake.scheduler.config import JointConfig
from mooncake.scheduler.costs import DecodePrices, Offer, PrefillPrices, find_source
from mooncake.scheduler.placement.base import (
    Ask,
    Batches,
    Candidates,
    Decision,
    Known,
    Offers,
    alone,
    conclude,
    decide_decode_only,
    decode_prices,
    find_batch,
    find_candidates,
    find_cheapest,
    find_free_holder,
    pick,
)


class Joint:
    name = "joint"

    def __init__(self, known: Known, config: JointConfig) -> None:
        self._known = known
        self._view = known.view
        self._links = known.view.links
        self._costs = known.costs
        self._config = config

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        candidates = find_candidates(self._view, ask)
        if candidates is None:
            return None
        if ask.decode_only:
            return decide_decode_only(self._known, ask, candidates, now)
        offers = self._choose_prefill(ask, candidates, now)
        batches = self._choose_decode(ask, candidates, offers, now)
        in_place = None if candidates.in_place else self._in_place(ask, candidates, now)
        if in_place is None:
            return conclude(offers, batches)
        if in_place.chosen.cost_ns >= offers.chosen.cost_ns + batches.chosen.cost_ns:
            decision = conclude(offers, batches)
            decision.others = in_place
            return decision
        prices = decode_prices(self._known, ask, candidates, now, now)
        decision = conclude(in_place, alone(prices, in_place.chosen.row))
        decision.others = offers
        return decision

    # ------------------------------------------------------------ prefill

    def _choose_prefill(self, ask: Ask, candidates: Candidates, now: int) -> Offers:
        pool, match, mask = candidates.prefill, ask.match, candidates.prefill_mask
        links, costs, weight = self._links, self._costs, self._config.work_weight
        prices = PrefillPrices(pool, match, ask.num_tokens, None, links, costs, now, True, weight)
        offers = find_free_holder(prices, match, mask)
        if offers is not None:
            return offers
        prices.source = find_source(match, self._view.node_bits, pool, links, costs, now)
        offers = find_cheapest(prices, match, mask)
        limit = ask.slo.ttft_ns
        if limit is not None and offers.chosen.ttft_ns > limit and weight:
            first = PrefillPrices(pool, match, ask.num_tokens, prices.source, links, costs, now, True)
            soonest = find_cheapest(first, match, mask)
            if soonest.chosen.ttft_ns <= limit:
                return soonest
        return offers

    # ------------------------------------------------------------ decode

    def _choose_decode(self, ask: Ask, candidates: Candidates, offers: Offers, now: int) -> Batches:
        offer, num_tokens, num_output, costs = offers.chosen, ask.num_tokens, ask.num_output, self._costs
        num_blocks = num_tokens / costs.tokens
        prices = DecodePrices(
            candidates.decode,
            num_tokens,
            num_output,
            ask.num_choices,
            now + int(offer.ttft_ns),
            self._links,
            now,
            num_output,
            offers.prices.pool.nodes[offer.row],
            num_blocks * costs.dram_ns,
            num_blocks * costs.remote_ns,
        )
        if candidates.in_place:
            return alone(prices, offer.row)
        batches = find_batch(prices, candidates.decode_mask)
        limit = ask.slo.tbt_ns
        if limit is not None and batches.chosen.tbt_ns > limit:
            by_step = decode_prices(self._known, ask, candidates, prices.joins_at, now)
            shortest = find_batch(by_step, candidates.decode_mask)
            if shortest.chosen.tbt_ns <= limit:
                return shortest
        return batches

    # ------------------------------------------------------------ in place

    def _in_place(self, ask: Ask, candidates: Candidates, now: int) -> Offers | None:
        """The cheapest of the decode instances that have most of the prompt in their pages and may compute the rest."""
        pool, match, costs = candidates.decode, ask.match, self._costs
        length, holders = match.longest(pool.fast_bits)
        if not length or ask.num_tokens - length * costs.tokens > self._config.in_place_tokens_max:
            return None
        prices = PrefillPrices(pool, match, ask.num_tokens, None, self._links, costs, now, hidden=True)
        batches = decode_prices(self._known, ask, candidates, now, now)
        batches.tbt_weight = ask.num_output
        priced: list[Offer] = []
        for row in pool.rows_of(holders) or ():
            if pool.members[row].num_waiting:
                continue  # it would stand in line behind them until they have their pages and their KV
            offer, batch = prices.offer(row), batches.batch(row)
            # Its tokens are computed along with a decode step, and every sequence there waits for them.
            offer.queue_ns += int(batch.tbt_ns)
            offer.ttft_ns += int(batch.tbt_ns)
            offer.cost_ns = offer.ttft_ns + batch.num_seqs * offer.prefill_ns + batch.cost_ns
            gap = batch.tbt_ns + offer.prefill_ns
            bearable = gap <= (2.0 * batch.tbt_ns if ask.slo.tbt_ns is None else ask.slo.tbt_ns)
            if bearable and batches.fits(batch) and offer.own >= length and candidates.decode_mask[row]:
                priced.append(offer)
        if not priced:
            return None
        return Offers(prices, priced, pick(priced, min([offer.cost_ns for offer in priced]), pool))
