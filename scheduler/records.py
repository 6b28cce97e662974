"""Decision records: the numbers behind the last placements, kept as the arrays they were computed in; text only on
demand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from mooncake.core.messages import PlaceRequest
from mooncake.core.types import AttemptKey
from mooncake.scheduler.admission import Verdict
from mooncake.scheduler.costs import LOCAL, PULL, Offer
from mooncake.scheduler.placement import Batches, Decision, Offers


class Record(msgspec.Struct):
    """names: by slot, at that time."""

    policy: str
    block_tokens: int
    request: PlaceRequest
    at_ns: int
    names: tuple[str, ...]
    decision: Decision
    verdict: Verdict

    @property
    def key(self) -> AttemptKey:
        return self.request.key

    def render(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        decision, verdict, key = self.decision, self.verdict, self.key
        outcome = f"refused, {verdict.reason}" if verdict.enforced else "placed"
        name = f"{key.frontend}/{key.request}/{key.choice}/{key.attempt}"
        yield f"{name} {outcome} by {self.policy} at {self.at_ns / 1e9:.3f} s: {self.request.num_tokens} tokens"
        if verdict.reason:
            yield f"  admission: {verdict.detail}" + ("" if verdict.enforced else " (soft: not enforced)")
        for offers, chosen in ((decision.offers, True), (decision.others, False)):
            if offers is not None:
                yield from self._offer_lines(offers, chosen)
        if decision.offers is not None and decision.prediction.queue_ns != decision.offers.chosen.queue_ns:
            yield f"  its tenant's turn comes after {_ms(decision.prediction.queue_ns)} ms of that queue"
        yield from self._batch_lines(decision.batches)

    def _offer_lines(self, offers: Offers, chosen: bool) -> Iterator[str]:
        pool = offers.prices.pool
        where = "prefill in place at" if pool is self.decision.batches.prices.pool else "prefill"
        for offer in sorted(offers.priced, key=lambda offer: offer.row):
            mark = _mark(chosen and offer is offers.chosen)
            cost = "" if offer.cost_ns == offer.ttft_ns else f", cost {_ms(offer.cost_ns)}"
            yield f"  {mark} {where} {pool.names[offer.row]}: TTFT {self._sum(offers, offer)}{cost}"
            for other in offer.others:
                yield f"       not {self._sum(offers, other)}"
        num_others = len(pool) - len(offers.priced)
        if num_others and offers.at_least_ns is not None:
            yield f"     {num_others} others: not priced, cost at least {_ms(offers.at_least_ns)}"

    def _sum(self, offers: Offers, offer: Offer) -> str:
        prices, tokens = offers.prices, offer.blocks * self.block_tokens
        read = prices.read_ns(offer.load_ns, offer.num_slow) if prices.hidden else 0.0
        load, prefill = f"load {_ms(offer.load_ns - read)}", f"prefill {_ms(offer.prefill_ns)}"
        both = f"max({load}, {prefill})" if prices.hidden else f"{load} + {prefill}"
        if read:
            both = f"read {_ms(read)} + {both}"
        text = (
            f"{_ms(offer.ttft_ns)} ms = queue {_ms(offer.queue_ns)} + {both} ({offer.way}: "
            f"{self.request.num_tokens - tokens} new after {tokens} reused tokens: {offer.own} of {offer.blocks} blocks in own "
            "pages"
        )
        if offer.blocks > offer.own:
            pulled = prices.source if offer.way == PULL else None
            slot = pulled.slot if pulled is not None else prices.pool.nodes[offer.row]
            text += f", the rest from {self.names[slot] or 'no node'}"
        if offer.num_slow:
            text += f", {offer.num_slow} of it from ssd"
        if offer.way == LOCAL and offer.expected > offer.own:
            text += f", waits for {offer.expected - offer.own} that are computed there"
        return text + ")"

    def _batch_lines(self, batches: Batches) -> Iterator[str]:
        pool, prices = batches.prices.pool, batches.prices
        for batch in sorted(batches.priced, key=lambda batch: batch.row):
            room = "has room" if prices.fits(batch) else "full"
            handover = f", hand-over {_ms(batch.handover_ns)} ms" if prices.node else ""
            cost = "" if batch.cost_ns == batch.tbt_ns else f", cost {_ms(batch.cost_ns)}"
            yield (
                f"  {_mark(batch is batches.chosen)} decode {pool.names[batch.row]}: TBT {_ms(batch.tbt_ns)} ms "
                f"at batch {batch.num_seqs:.1f} + {self.request.num_choices}, {room}{handover}{cost}"
            )
        num_others = len(pool) - len(batches.priced)
        if num_others:
            yield f"     {num_others} others: not priced, more is booked there"


Entry = tuple[PlaceRequest, int, tuple[str, ...], Decision, Verdict]
"""The last fields of a record."""


class Records:
    """The last `num_max` records."""

    def __init__(self, num_max: int, policy: str, block_tokens: int) -> None:
        self._policy = policy
        self._block_tokens = block_tokens
        self._entries: deque[Entry] = deque(maxlen=num_max)

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)

    def get(self, key: AttemptKey) -> Record | None:
        """The newest of that attempt."""
        found = next((entry for entry in reversed(self._entries) if entry[0].key == key), None)
        return Record(self._policy, self._block_tokens, *found) if found is not None else None

    def of_request(self, frontend: str, request: int) -> list[Record]:
        """Of all its attempts, oldest first."""
        found = [entry for entry in self._entries if entry[0].key.request == request]
        return [
            Record(self._policy, self._block_tokens, *entry) for entry in found if entry[0].key.frontend == frontend
        ]

    def __len__(self) -> int:
        return len(self._entries)


def _mark(chosen: bool) -> str:
    return "->" if chosen else "  "


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.2f}"
