"""Decision records: the numbers behind the last placements, kept as the arrays they were computed in; text only on
demand.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from mooncake.core.types import AttemptKey
from mooncake.scheduler.admission import Verdict
from mooncake.scheduler.placement import Decision


class Record(msgspec.Struct):
    key: AttemptKey
    at_ns: int
    policy: str
    num_tokens: int
    num_choices: int
    block_tokens: int
    names: tuple[str, ...]
    """By slot, at that time."""
    decision: Decision
    verdict: Verdict

    def render(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        decision, verdict, key = self.decision, self.verdict, self.key
        outcome = f"refused, {verdict.reason}" if verdict.enforced else "placed"
        name = f"{key.frontend}/{key.request}/{key.choice}/{key.attempt}"
        yield f"{name} {outcome} by {self.policy} at {self.at_ns / 1e9:.3f} s: {self.num_tokens} tokens"
        if verdict.reason:
            yield f"  admission: {verdict.detail}" + ("" if verdict.enforced else " (soft: not enforced)")
        if decision.prefill is not None:
            yield from self._prefill_lines()
        yield from self._decode_lines()

    def _prefill_lines(self) -> Iterator[str]:
        decision, names = self.decision, self.names
        terms, reuse = decision.prefill_terms, decision.reuse
        assert terms is not None and reuse is not None and decision.prefill_pool is not None
        for slot in np.flatnonzero(decision.prefill_pool).tolist():
            blocks = int(reuse.blocks[slot])
            tokens = blocks * self.block_tokens
            node = names[int(reuse.node[slot])] or "no node"
            yield (
                f"  {_mark(slot == decision.prefill)} prefill {names[slot]}: TTFT {_ms(terms.ttft_ns[slot])} ms = "
                f"queue {_ms(terms.queue_ns[slot])} + load {_ms(terms.load_ns[slot])} "
                f"+ prefill {_ms(terms.prefill_ns[slot])} ({self.num_tokens - tokens} new after {tokens} "
                f"reused tokens: {int(reuse.own[slot])} of {blocks} blocks in own pages, the rest from {node})"
            )

    def _decode_lines(self) -> Iterator[str]:
        decision, terms = self.decision, self.decision.decode_terms
        for slot in np.flatnonzero(decision.decode_pool).tolist():
            room = "has room" if terms.fits[slot] else "full"
            yield (
                f"  {_mark(slot == decision.decode)} decode {self.names[slot]}: TBT {_ms(terms.tbt_ns[slot])} ms "
                f"at batch {int(terms.num_seqs[slot])} + {self.num_choices}, {room}"
            )


class Records:
    """The last `num_max` records, by attempt."""

    def __init__(self, num_max: int) -> None:
        self._num_max = num_max
        self._records: dict[AttemptKey, Record] = {}

    def add(self, record: Record) -> None:
        self._records.pop(record.key, None)
        self._records[record.key] = record
        if len(self._records) > self._num_max:
            del self._records[next(iter(self._records))]

    def get(self, key: AttemptKey) -> Record | None:
        return self._records.get(key)

    def __len__(self) -> int:
        return len(self._records)


def _mark(chosen: bool) -> str:
    return "->" if chosen else "  "


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.2f}"
