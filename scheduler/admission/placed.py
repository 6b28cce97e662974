"""Placement: what is predicted of the very placement that was chosen. Ours, and the default.

TBT is the mean of the longest tenth of gaps (FACTS section 1), so it is judged by the batch at its largest, with all that is
booked on the decode instance, and by the gap of the hand-over, which is one of them.
"""

from __future__ import annotations

import math

from mooncake.core.stats import TBT_SHARE
from mooncake.scheduler.admission.base import Question, Times, sequences_ns


class Placement:
    name = "placement"
    checks_decode = False

    def times(self, question: Question) -> Times:
        decision, num_gaps = question.decision, question.num_output - 1
        decode, handover_ns = decision.decode, decision.batches.chosen.handover_ns
        tbt_ns = decode.decode[0] + decode.batch_ns + decode.pending_ns + sequences_ns(question)
        if handover_ns > tbt_ns:
            tbt_ns += (handover_ns - tbt_ns) / max(1, math.ceil(TBT_SHARE * num_gaps))
        return Times(decision.prediction.ttft_ns, int(tbt_ns))
