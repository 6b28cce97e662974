"""What all policies share: the question, the answer, who may be asked, and how ties are broken."""

from __future__ import annotations

import random
from typing import Protocol

import msgspec
import numpy as np

from mooncake.core.messages import Prediction
from mooncake.core.types import NANOS_PER_MS
from mooncake.scheduler.costs import BlockCosts, DecodeTerms, PrefillTerms, Reuse, decode_terms, prefill_terms
from mooncake.scheduler.prefix_index import Match
from mooncake.scheduler.view import View

TIE_NS = NANOS_PER_MS
"""Predicted TTFTs closer than this are equal: the estimate is no better, and spreading is worth more."""


class Ask(msgspec.Struct):
    """One placement question. `num_output`: output tokens expected still to come, of each choice."""

    num_tokens: int
    num_output: int
    match: Match
    exclude: tuple[str, ...] = ()
    decode_only: bool = False
    num_choices: int = 1


class Decision(msgspec.Struct):
    """Slots chosen, and the numbers behind the choice (arrays by slot, kept for the record).

    prefill is None if only decode was asked for; it equals decode if that instance prefills in place. source: slot of
    the store node to load from, or 0, with the number of leading blocks to take from it."""

    prefill: int | None
    decode: int
    source: int
    num_source_blocks: int
    num_reused: int
    """Blocks."""
    prediction: Prediction
    reuse: Reuse | None
    prefill_terms: PrefillTerms | None
    decode_terms: DecodeTerms
    prefill_pool: np.ndarray | None
    decode_pool: np.ndarray


class Policy(Protocol):
    name: str

    def choose(self, ask: Ask, now: int, rng: random.Random) -> Decision | None:
        """None if no ready instances can take it."""
        ...


class Pools(msgspec.Struct):
    """Candidates of one question, as masks by slot. In place: both are the same colocated instances."""

    prefill: np.ndarray
    decode: np.ndarray
    in_place: bool


def find_pools(view: View, ask: Ask) -> Pools | None:
    """Colocated instances prefill in place only if there is no ready prefill instance that could take the request."""
    # Decode needs room for the next token, prefill does not.
    decode = _narrow(view, view.decode_ready, ask.num_tokens + 1, ask.exclude)
    if ask.decode_only:
        return Pools(decode, decode, False) if decode is not None else None
    prefill = _narrow(view, view.prefill_ready, ask.num_tokens, ask.exclude)
    if prefill is not None and decode is not None:
        return Pools(prefill, decode, False)
    both = _narrow(view, view.colocated_ready, ask.num_tokens + 1, ask.exclude)
    return Pools(both, both, True) if both is not None else None


def _narrow(view: View, ready: np.ndarray, num_tokens: int, exclude: tuple[str, ...]) -> np.ndarray | None:
    """Without those too small, and without the excluded ones unless nothing else is left. None if nobody is left."""
    mask: np.ndarray = ready & (view.columns.capacity_tokens >= num_tokens)
    if exclude:
        kept = mask.copy()
        kept[[view.slot(name) for name in exclude if view.knows(name)]] = False
        mask = kept if kept.any() else mask
    return mask if mask.any() else None


def pick(cost: np.ndarray, load: np.ndarray, pool: np.ndarray, slack: float, rng: random.Random) -> int:
    """The cheapest slot of the pool; among those within `slack` of it the least loaded; among those by lot."""
    slots = np.flatnonzero(pool)
    costs = cost[slots]
    slots = slots[costs <= costs.min() + slack]
    if len(slots) > 1:
        loads = load[slots]
        slots = slots[loads == loads.min()]
    return int(slots[rng.randrange(len(slots))] if len(slots) > 1 else slots[0])


def pick_decode(view: View, terms: DecodeTerms, pool: np.ndarray, prefill: int | None, rng: random.Random) -> int:
    """The shortest step among those with room; without room anywhere, the shortest line. The prefill's own node wins
    ties: its hand-over stays on the machine."""
    roomy = pool & terms.fits
    if not roomy.any():
        return pick(terms.num_seqs, view.columns.num_decodes, pool, 0, rng)
    load = view.columns.num_decodes
    if prefill is not None:
        load = 2 * load + (view.columns.node != view.columns.node[prefill])
    return pick(terms.tbt_ns, load, roomy, 0, rng)


def decide_decode_only(view: View, ask: Ask, pools: Pools, rng: random.Random) -> Decision:
    terms = decode_terms(view, ask.num_tokens, ask.num_output, ask.num_choices)
    chosen = pick_decode(view, terms, pools.decode, None, rng)
    prediction = Prediction(tbt_ns=int(terms.tbt_ns[chosen]))
    return Decision(None, chosen, 0, 0, 0, prediction, None, None, terms, None, pools.decode)


def decide(
    view: View, ask: Ask, pools: Pools, reuse: Reuse, by_queue: bool, costs: BlockCosts, now: int, rng: random.Random
) -> Decision:
    """Prefill by least predicted TTFT, or by the shortest queue; then decode by load."""
    prefill = prefill_terms(view, reuse, ask.num_tokens, costs.tokens, now)
    decode = decode_terms(view, ask.num_tokens, ask.num_output, ask.num_choices)
    pool = pools.prefill
    if pools.in_place and (pool & decode.fits).any():
        pool = pool & decode.fits
    cost = prefill.queue_ns if by_queue else prefill.ttft_ns
    chosen = pick(cost, view.columns.num_prefills + view.columns.num_decodes, pool, TIE_NS, rng)
    target = chosen if pools.in_place else pick_decode(view, decode, pools.decode, chosen, rng)
    queue_ns, load_ns, prefill_ns = (
        int(term[chosen]) for term in (prefill.queue_ns, prefill.load_ns, prefill.prefill_ns)
    )
    prediction = Prediction(queue_ns, load_ns, prefill_ns, queue_ns + load_ns + prefill_ns, int(decode.tbt_ns[target]))
    num_reused, node = int(reuse.blocks[chosen]), int(reuse.node[chosen])
    loads = node != 0 and num_reused > int(reuse.own[chosen])
    source, num_source = (node, num_reused) if loads else (0, 0)
    return Decision(
        chosen, target, source, num_source, num_reused, prediction, reuse, prefill, decode, pools.prefill, pools.decode
    )
