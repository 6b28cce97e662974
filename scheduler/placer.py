"""One placement from question to answer:

    match -> policy chooses -> admission judges -> booked, predicted into the index -> answered, recorded

Choosing and judging have no side effects; the booking is made in one place, before the answer is sent.
"""

from __future__ import annotations

import random
from collections import Counter

import msgspec

from mooncake.core.messages import CopyBlocks, Placed, PlaceRequest, Prediction, Rejected, Send
from mooncake.core.types import TENANT_SHARE_MAX, AttemptKey, KvSource
from mooncake.scheduler.admission import RETRY_NS_MAX, RETRY_NS_MIN, Gate, Question, Verdict
from mooncake.scheduler.answers import Answers
from mooncake.scheduler.bookings import Books
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.costs import BlockCosts, sibling_pages
from mooncake.scheduler.placement import Ask, Decision, Known, make_policy
from mooncake.scheduler.pools import Instance
from mooncake.scheduler.prefix_index import PrefixIndex
from mooncake.scheduler.records import Records
from mooncake.scheduler.replication import Replicate, make_replication
from mooncake.scheduler.view import View

NO_INSTANCE = "no_instance"
TOO_LONG = "too_long"
QUEUE_FULL = "queue_full"
_NO_PREDICTION = Prediction()
_EXPIRY_STEP_NS = 1_000_000_000
"""Predictions expire together at whole multiples of this, so that they wake nobody one by one."""


class Placer:
    def __init__(
        self,
        config: ConductorConfig,
        view: View,
        books: Books,
        index: PrefixIndex,
        gate: Gate,
        rng: random.Random,
        costs: BlockCosts,
    ) -> None:
        self.config = config
        self.records = Records(config.num_records_max, config.policy, config.block_tokens)
        self.answers = Answers(config.num_answers_max)
        self.counts: Counter[str] = Counter()
        """placed, waited, replicated, soft_REASON, rejected_REASON: for metrics."""
        self._view = view
        self._books = books
        self._index = index
        self._rng = rng
        self._costs = costs
        self._policy = make_policy(config, Known(view, books, self._costs))
        self._gate = gate
        self._replication = make_replication(config, view, costs)
        self.copies: list[Send] = []
        """Copies of hot prefixes that the last placements asked store nodes for; the core sends them with its answers."""

    # ------------------------------------------------------------ the answer

    def place(self, request: PlaceRequest, now: int) -> Placed | Rejected | None:
        """None if it must wait: no ready instances can take it, but others may."""
        config, view = self.config, self._view
        num_output = view.lengths.expect(request.max_tokens, request.num_generated)
        # At least one token is left to compute: the next one is drawn from its logits.
        num_keys = 0 if request.decode_only else (request.num_tokens - 1) // config.block_tokens
        keys = request.block_keys if num_keys >= len(request.block_keys) else request.block_keys[:num_keys]
        ask = Ask(
            request.num_tokens,
            num_output,
            self._index.match(keys),
            request.exclude,
            request.decode_only,
            request.num_choices,
            request.slo,
        )
        decision = self._policy.choose(ask, now, self._rng)
        if decision is None:
            return self._reject_too_long(request, now)
        if decision.prefill is not None and decision.prefill is not decision.decode:
            _shorten_queue(decision, decision.prefill, request)
        if request.first and self._is_full(decision, request.tenant):
            verdict = self._queue_full(decision)
        else:
            verdict = self._gate.judge(Question(request, decision, num_output, now))
        self.records.add((request, now, view.names, decision, verdict))
        if verdict.enforced:
            retry_ns, prediction = verdict.retry_after_ns, decision.prediction
            return self.reject(request.key, verdict.reason, verdict.detail, now, retry_ns, prediction)
        if verdict.reason:
            self.counts[f"soft_{verdict.reason}"] += 1
        return self._book(request, num_output, decision, verdict, now)

    def _is_full(self, decision: Decision, tenant: str) -> bool:
        """Whether an instance would refuse it, so that it would be tried again and again, and fail after all. No tenant has all
        places."""
        most, prefill, decode = self.config.num_queued_max, decision.prefill, decision.decode
        if most is None:
            return False
        own = max(1, int(most * TENANT_SHARE_MAX)) if tenant else most
        if decode.num_decodes >= most or decode.decoding[tenant] >= own:
            return True
        return prefill is not None and (prefill.num_prefills >= most or prefill.tenants.num_prefills(tenant) >= own)

    def _queue_full(self, decision: Decision) -> Verdict:
        detail = f"the least loaded instance has as many requests as it takes: {self.config.num_queued_max}"
        retry_ns = min(max(decision.prediction.queue_ns, RETRY_NS_MIN), RETRY_NS_MAX)
        return Verdict(QUEUE_FULL, detail, True, retry_ns)

    def reject(
        self,
        key: AttemptKey,
        reason: str,
        detail: str,
        now: int,
        retry_ns: int = RETRY_NS_MIN,
        prediction: Prediction = _NO_PREDICTION,
    ) -> Rejected:
        answer = Rejected(key, reason, detail, 0 if reason == TOO_LONG else retry_ns, prediction)
        self.answers.remember(key, answer, now)
        self.counts[f"rejected_{reason}"] += 1
        return answer

    # ------------------------------------------------------------ booking

    def _book(self, request: PlaceRequest, num_output: int, decision: Decision, verdict: Verdict, now: int) -> Placed:
        key, num_choices, num_tokens = request.key, request.num_choices, request.num_tokens
        prefill, decode, prediction = decision.prefill, decision.decode, decision.prediction
        apart = prefill is not None and prefill is not decode
        answer = Placed(
            key,
            prefill.info.name if prefill is not None and apart else "",
            decode.info.name,
            self._source(request, decision) if decision.source else None,
            prediction,
            num_choices,
            apart and self._gate.checks_decode,
        )
        page_tokens = decode.info.page_tokens
        num_pages = -(-(num_tokens + num_output) // page_tokens)
        busy_ns, joins_at = prediction.load_ns + prediction.prefill_ns, now + prediction.ttft_ns
        owner = request.tenant, request.weight
        booking = self._books.book(key, num_tokens, prefill, busy_ns, decode, num_pages, joins_at, now, *owner)
        booking.answer, booking.slo, booking.judged_tbt_ns = answer, request.slo, verdict.tbt_ns
        self.answers.remember(key, answer, now)
        if num_choices > 1:
            for other in choice_keys(request)[1:]:
                sibling = self._books.book_sibling(booking, other, sibling_pages(num_output, page_tokens))
                sibling.answer, sibling.slo = answer, request.slo
                self.answers.remember(other, answer, now)
        num_computed = num_output
        if decision.offers is not None:
            self._foresee(request, decision, now)
            num_computed += num_tokens - decision.offers.chosen.blocks * self.config.block_tokens
        self._gate.spend(*owner, num_computed, now)
        if self._replication is not None:
            wished = self._replication.used(request.block_keys, decision, now)
            if wished is not None:
                self._replicate(wished, decision, now)
        self.counts["placed"] += 1
        return answer

    def _foresee(self, request: PlaceRequest, decision: Decision, now: int) -> None:
        """What the placement will do to links and caches."""
        prefill, offers, view = decision.prefill, decision.offers, self._view
        assert prefill is not None and offers is not None
        node = view.node_slot(prefill.info.node)
        if not node:
            return
        if decision.num_loaded:
            block_bytes, links = self._costs.num_bytes, view.links
            links.book_transfer(decision.source, node, decision.num_loaded * block_bytes, now)
            if decision.num_slow:
                links.book_ssd(decision.source, decision.num_slow * block_bytes, now)
        if offers.chosen.own < len(request.block_keys):
            expires_ns = now + decision.prediction.ttft_ns + self.config.prediction_grace_ns
            expires_ns += -expires_ns % _EXPIRY_STEP_NS
            self._index.predict(prefill.slot, request.block_keys, expires_ns)

    def _replicate(self, wished: Replicate, decision: Decision, now: int) -> None:
        """The copy passes both NICs like any other transfer."""
        view, num_blocks = self._view, len(wished.block_keys)
        assert decision.prefill is not None
        node = view.nodes[wished.source].info
        num_bytes = num_blocks * self._costs.num_bytes
        view.links.book_transfer(view.node_slot(wished.source), view.node_slot(wished.target), num_bytes, now)
        num_tokens = num_blocks * self.config.block_tokens
        source = KvSource(node.name, num_tokens, wished.block_keys, addresses=node.addresses)
        self.copies.append(Send(wished.target, CopyBlocks(source, decision.prefill.info.shard)))
        self.counts["replicated"] += 1

    def hand_over(self, prefill: str, decode: str, num_tokens: int, now: int) -> None:
        """A prefill is done, so its KV goes over the network."""
        view = self._view
        num_bytes = num_tokens * self._costs.token_bytes
        view.links.book_transfer(view.node_slot(prefill), view.node_slot(decode), num_bytes, now)

    def _source(self, request: PlaceRequest, decision: Decision) -> KvSource:
        node = self._view.nodes[self._view.names[decision.source]].info
        num_blocks = decision.num_source_blocks
        return KvSource(
            node=node.name,
            num_tokens=num_blocks * self.config.block_tokens,
            block_keys=request.block_keys[:num_blocks],
            addresses=node.addresses,
        )

    # ------------------------------------------------------------ what fits nowhere

    def _reject_too_long(self, request: PlaceRequest, now: int) -> Rejected | None:
        """None if some instance, ready or not, could take it."""
        num_tokens_max = self._num_tokens_max(request)
        if num_tokens_max is None or request.num_tokens <= num_tokens_max:
            return None
        detail = f"{request.num_tokens} tokens; the largest instance holds {num_tokens_max}"
        return self.reject(request.key, TOO_LONG, detail, now)

    def _num_tokens_max(self, request: PlaceRequest) -> int | None:
        """The longest sequence that the instances known now could take, ready or not; None if a pool is empty."""
        instances = self._view.instances.values()
        decode = max((member.capacity_tokens for member in instances if not member.does_prefill), default=None)
        if decode is None or request.decode_only:
            return None if decode is None else decode - 1
        prefill = max((member.capacity_tokens for member in instances if member.does_prefill), default=None)
        in_place = max((member.capacity_tokens for member in instances if member.prefills_in_place), default=None)
        ways = [] if prefill is None else [min(prefill, decode - 1)]
        ways += [] if in_place is None else [in_place - 1]
        return max(ways, default=None)


def _shorten_queue(decision: Decision, prefill: Instance, request: PlaceRequest) -> None:
    """Tenants take turns there, so what others have booked does not all come first. Instances are compared by their whole
    queues nevertheless: that spreads the work, and is quick."""
    before = decision.prediction
    queue_ns = prefill.tenants.wait_ns(request.tenant, request.weight, before.queue_ns)
    if queue_ns != before.queue_ns:
        ttft_ns = before.ttft_ns - before.queue_ns + queue_ns
        decision.prediction = msgspec.structs.replace(before, queue_ns=queue_ns, ttft_ns=ttft_ns)


def choice_keys(request: PlaceRequest) -> list[AttemptKey]:
    """Of each choice that is placed by this request, first its own."""
    key = request.key
    if request.num_choices == 1:
        return [key]
    return [key.of_choice(key.choice + index) for index in range(request.num_choices)]
