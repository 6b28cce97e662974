"""Whether a request whose placement is predicted to break its objectives is turned away, before anything was spent on
it.

`gate` joins what is judged by (a *rule*: sibling files of one shape), how far a rule is trusted (a *mode*), and who is
refused first (classes and tenants' `shares`). `accuracy` compares predictions with outcomes.
"""

from mooncake.scheduler.admission.accuracy import Accuracy
from mooncake.scheduler.admission.base import Question, Rule, Verdict
from mooncake.scheduler.admission.baseline import Baseline
from mooncake.scheduler.admission.early import Early
from mooncake.scheduler.admission.early_predicted import EarlyPredicted
from mooncake.scheduler.admission.gate import RETRY_NS_MAX, RETRY_NS_MIN, Gate
from mooncake.scheduler.admission.placed import Placement
from mooncake.scheduler.admission.shares import Shares
from mooncake.scheduler.config import ConductorConfig
from mooncake.scheduler.starts import NoStarts, Starts
from mooncake.scheduler.view import View

__all__ = ["RETRY_NS_MAX", "RETRY_NS_MIN", "Accuracy", "Gate", "Question", "Verdict", "make_gate", "make_starts"]


def make_starts(config: ConductorConfig) -> Starts | NoStarts:
    return Starts() if config.admission_rule == "early_predicted" else NoStarts()


def make_gate(config: ConductorConfig, view: View, starts: Starts | NoStarts, accuracy: Accuracy) -> Gate:
    rule: Rule
    match config.admission_rule:
        case "placement":
            rule = Placement(view.lengths)
        case "baseline":
            rule = Baseline()
        case "early":
            rule = Early(view)
        case "early_predicted":
            assert isinstance(starts, Starts)
            rule = EarlyPredicted(view, starts)
    return Gate(config, rule, accuracy, Shares(config.fairness), view.lengths)
