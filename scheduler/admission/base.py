"""What all rules share: the question, the times they judge by, the answer."""

from __future__ import annotations

from typing import Protocol

import msgspec

from mooncake.core.messages import PlaceRequest
from mooncake.scheduler.placement import Decision


class Question(msgspec.Struct, gc=False):
    """num_output: expected of each choice."""

    request: PlaceRequest
    decision: Decision
    num_output: int
    now: int


class Times(msgspec.Struct, gc=False):
    """What to compare with the objectives; None: not judged now."""

    ttft_ns: int | None
    tbt_ns: int | None


class Rule(Protocol):
    name: str
    checks_decode: bool
    """Whether decode is judged when the prefill is done, so that a placement must be asked for again then."""
    keeps_margin: bool
    """Whether room is kept for times that turn out longer than predicted; the paper's rules know none."""

    def times(self, question: Question) -> Times: ...


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """reason is "" if both objectives are predicted to be met; `enforced` says whether the request is refused for
    it."""

    reason: str = ""
    detail: str = ""
    enforced: bool = False
    retry_after_ns: int = 0
    tbt_ns: int | None = None
    """What was compared with the TBT objective, margin not included; None: nothing was."""


def sequences_ns(question: Question) -> float:
    """What the request adds to a decode step."""
    request = question.request
    return request.num_choices * question.decision.decode.sequence_ns(request.num_tokens)
