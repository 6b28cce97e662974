"""The paper's baseline: at placement only TTFT is judged; decode's load when the prefill is done, and what is refused then
has been prefilled for nothing (FACTS section 2).
"""

from __future__ import annotations

from mooncake.scheduler.admission.base import Question, Times


class Baseline:
    name = "baseline"
    checks_decode = True
    keeps_margin = False

    def times(self, question: Question) -> Times:
        prediction = question.decision.prediction
        if question.request.decode_only:
            return Times(None, prediction.tbt_ns)
        return Times(prediction.ttft_ns, None)
