"""Early rejection by prediction (FACTS section 2): TTFT, and the mean step of the decode pool at the time when this prefill
would end: requests whose prefill will be done by then are added, those that will have decoded for longer than t_d are
gone. t_d is one for all: the mean output learnt so far at the pool's present step.
"""

from __future__ import annotations

from mooncake.scheduler.admission.base import Question, Times, sequences_ns
from mooncake.scheduler.starts import Starts
from mooncake.scheduler.view import View


class EarlyPredicted:
    name = "early_predicted"
    checks_decode = False
    keeps_margin = False

    def __init__(self, view: View, starts: Starts) -> None:
        self._view = view
        self._starts = starts

    def times(self, question: Question) -> Times:
        pool, starts, now = self._view.pools[1], self._starts, question.now
        ttft_ns = question.decision.prediction.ttft_ns
        idle_ns = pool.mean_idle_ns
        decode_ns = int(self._view.lengths.mean * (idle_ns + pool.mean_batch_ns))
        starts.pass_time(now)
        running_ns = starts.between(now + ttft_ns - decode_ns, now + ttft_ns)
        return Times(ttft_ns, int(idle_ns + (running_ns + sequences_ns(question)) / len(pool)))
