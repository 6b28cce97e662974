"""Placement: what is predicted of the very placement that was chosen. Ours, and the default.

TBT is the mean of the longest tenth of gaps (FACTS section 1), so it is judged by the batch at its largest, with all that is
booked on the decode instance, and by the gap of the hand-over, which is one of them: the KV's way, and the wait for a place
where the batch or the pages are full.

    wait = what is too much there, as part of what it holds * time that a mean output takes - time until the first token
"""

from __future__ import annotations

import math

from mooncake.core.stats import TBT_SHARE
from mooncake.scheduler.admission.base import Question, Times, sequences_ns
from mooncake.scheduler.lengths import Lengths


class Placement:
    name = "placement"
    checks_decode = False
    keeps_margin = True

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths

    def times(self, question: Question) -> Times:
        decision, num_gaps = question.decision, question.num_output - 1
        decode, ttft_ns = decision.decode, decision.prediction.ttft_ns
        tbt_ns = decode.decode[0] + decode.batch_ns + decode.pending_ns + sequences_ns(question)
        gap_ns = decision.batches.chosen.handover_ns
        if decision.prefill is not decode:
            gap_ns += max(0.0, self._place_wait_ns(question) - ttft_ns)
        if gap_ns > tbt_ns:
            tbt_ns += (gap_ns - tbt_ns) / max(1, math.ceil(TBT_SHARE * num_gaps))
        return Times(ttft_ns, int(tbt_ns))

    def _place_wait_ns(self, question: Question) -> float:
        """Until enough of what decodes there has ended for the request to have a place and pages."""
        request, decode = question.request, question.decision.decode
        info = decode.info
        num_pages = (question.num_output * request.num_choices + request.num_tokens) / info.page_tokens
        used = max(
            (decode.num_seqs + len(decode.pending) + request.num_choices) / info.max_batch,
            (decode.used_pages + decode.pending_pages + num_pages) / info.num_pages,
        )
        return max(0.0, used - 1.0) * self._lengths.mean * (decode.decode[0] + decode.batch_ns)
