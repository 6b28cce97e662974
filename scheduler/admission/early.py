"""Early rejection: TTFT, and the mean step of the decode pool with its load of now. Between this decision and the end of the
prefill that load changes, so the loads of the two pools come to swing against each other (FACTS section 2).
"""

from __future__ import annotations

from mooncake.scheduler.admission.base import Question, Times, sequences_ns
from mooncake.scheduler.view import View


class Early:
    name = "early"
    checks_decode = False
    keeps_margin = False

    def __init__(self, view: View) -> None:
        self._view = view

    def times(self, question: Question) -> Times:
        pool = self._view.pools[1]
        tbt_ns = pool.mean_idle_ns + pool.mean_batch_ns + sequences_ns(question) / len(pool)
        return Times(question.decision.prediction.ttft_ns, int(tbt_ns))
