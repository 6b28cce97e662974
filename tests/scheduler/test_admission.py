import random

import pytest

from mooncake.core.messages import AttemptEnded, LoadReport, PrefillDone, Rejected
from mooncake.core.types import AttemptKey, CostModel, Slo
from mooncake.scheduler.admission import Accuracy
from mooncake.scheduler.admission.shares import Shares
from mooncake.scheduler.config import AdmissionRule, Calibration, Fairness
from mooncake.scheduler.starts import BUCKET_NS, Starts
from tests.scheduler.cluster import COST, MS, Cluster, S, load

SLOW = CostModel(prefill=COST.prefill, decode=(10.0, 10.0, 0.0))
"""Decode: 10 ms + 10 ms a sequence."""


def busy(rule: AdmissionRule, num_running: int = 0, **config: object) -> Cluster:
    """One prefill and two decode instances, on each of which so many sequences run."""
    cluster = Cluster(admission="hard", admission_rule=rule, **config)
    cluster.core.view.lengths.mean_square = 1e30  # nobody who runs is about to end
    cluster.prefill("p", num_pages=100_000)
    for name in ("d0", "d1"):
        cluster.decode(name, cost=SLOW, num_pages=100_000)
        cluster.receive(name, LoadReport(load(name, 1, num_running=num_running)))
    return cluster


def refusal(cluster: Cluster, request: int, num_tokens: int = 10, **changes: object) -> tuple[str, str]:
    answer = cluster.answer(request, num_tokens, **changes)
    return (answer.reason, answer.detail) if isinstance(answer, Rejected) else ("", "")


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", ["placement", "baseline", "early", "early_predicted"])
def test_every_rule_judges_ttft_at_placement(rule: AdmissionRule) -> None:
    cluster = busy(rule)
    cluster.place(1, 100)  # 11 ms
    assert refusal(cluster, 2, 100, slo=Slo(ttft_ns=21 * MS)) == (
        "overloaded_ttft",
        "predicted TTFT 22.00 ms > objective 21.00 ms",
    )
    assert refusal(cluster, 3, 100, slo=Slo(ttft_ns=22 * MS)) == ("", "")


def test_placement_judges_the_decode_instance_that_was_chosen() -> None:
    cluster = busy("placement", 3)
    cluster.receive("d1", LoadReport(load("d1", 2, num_running=1)))
    assert refusal(cluster, 1, slo=Slo(tbt_ns=30 * MS)) == ("", "")
    # Both have a batch of two and one more now, so ours would be the third: 10 + 3 * 10 ms.
    assert refusal(cluster, 2, slo=Slo(tbt_ns=39 * MS)) == (
        "overloaded_tbt",
        "predicted TBT 40.00 ms > objective 39.00 ms",
    )


def test_baseline_judges_decode_when_the_prefill_is_done() -> None:
    cluster = busy("baseline", 3)
    slo = Slo(tbt_ns=45 * MS)
    assert cluster.place(1, slo=slo).check_decode
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 2 * MS))
    cluster.receive("f", AttemptEnded(AttemptKey("f", 1)))
    again = AttemptKey("f", 1, 0, 1)
    assert refusal(cluster, 1, key=again, slo=slo, decode_only=True) == (
        "overloaded_tbt",
        "predicted TBT 50.00 ms > objective 45.00 ms",
    )
    assert cluster.booked() == {"p": (0, 0), "d0": (0, 0), "d1": (0, 0)}
    failed_over = AttemptKey("f", 1, 0, 2)
    assert not cluster.place(1, key=failed_over, slo=slo, decode_only=True, first=False).check_decode


def test_early_takes_the_mean_of_the_pool_as_it_is_now() -> None:
    cluster = busy("early", 3)
    cluster.receive("d1", LoadReport(load("d1", 2, num_running=1)))
    # (40 + 20) / 2 and half of ours.
    assert refusal(cluster, 1, slo=Slo(tbt_ns=34 * MS)) == (
        "overloaded_tbt",
        "predicted TBT 35.00 ms > objective 34.00 ms",
    )
    cluster.place(2)  # what is being prefilled does not decode yet
    assert refusal(cluster, 3, slo=Slo(tbt_ns=35 * MS)) == ("", "")


def test_early_predicted_adds_who_will_come_and_takes_off_who_will_have_left() -> None:
    cluster = busy("early_predicted")
    cluster.core.view.lengths.mean = 100.0  # t_d is 100 steps of 10 ms
    cluster.place(1, 4_990)  # prefill for 0.5 s
    slo = Slo(tbt_ns=19 * MS)
    # At the end of ours, after 0.5 + 0.5 s, the first decodes: (10 + 10 + 10 + 10) / 2.
    assert refusal(cluster, 2, 4_990, slo=slo) == ("overloaded_tbt", "predicted TBT 20.00 ms > objective 19.00 ms")
    # Ours would end 2 s after the first, which will have left by then: (10 + 10 + 10) / 2.
    assert refusal(cluster, 3, 19_990, slo=slo) == ("", "")
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 500 * MS))
    cluster.receive("f", AttemptEnded(AttemptKey("f", 1)))
    cluster.end(3)
    assert refusal(cluster, 4, 4_990, slo=slo) == ("", "")


def test_windows_of_starts() -> None:
    starts = Starts()
    early, late = starts.add(0, 1.0), starts.add(3 * BUCKET_NS, 2.0)
    assert starts.between(-1, BUCKET_NS) == 1.0
    assert starts.between(0, 3 * BUCKET_NS) == 2.0, "after means after the whole bucket"
    assert starts.between(-BUCKET_NS, 4 * BUCKET_NS) == 3.0
    starts.remove(late, 2.0)
    far = starts.add(10_000 * BUCKET_NS, 4.0)
    assert starts.between(-1, 20_000 * BUCKET_NS) == 5.0
    starts.pass_time(129 * BUCKET_NS)
    starts.remove(early, 1.0)  # forgotten meanwhile
    assert starts.between(-1, 20_000 * BUCKET_NS) == 4.0
    starts.pass_time(10_000 * BUCKET_NS)
    starts.remove(far, 4.0)
    assert starts.between(-1, 20_000 * BUCKET_NS) == 0.0


# ---------------------------------------------------------------- modes


def test_off_notes_and_hard_refuses() -> None:
    for mode, refused in (("off", 0), ("hard", 1)):
        cluster = Cluster(admission=mode)
        cluster.prefill("p")
        cluster.decode("d")
        cluster.answer(1, 100, slo=Slo(ttft_ns=10 * MS))
        counts = cluster.core.counts
        assert (counts["rejected_overloaded_ttft"], counts["soft_overloaded_ttft"]) == (refused, 1 - refused)
        assert cluster.core.explain(AttemptKey("f", 1)) is not None
        cluster.place(2, 100, slo=Slo(ttft_ns=10 * MS), first=False)


def test_predictions_must_prove_themselves() -> None:
    accuracy = Accuracy(Calibration(num_outcomes_min=3, relative_error_max=0.2))
    for _ in range(3):
        assert not accuracy.calibrated("p", "ttft")
        accuracy.observe("p", "ttft", 110 * MS, 100 * MS)
    assert accuracy.calibrated("p", "ttft") and not accuracy.calibrated("p", "tbt")
    accuracy.observe("p", "ttft", 500 * MS, 100 * MS)
    assert accuracy.error("p", "ttft") == (0.1 * 3 + 4) / 4 and not accuracy.calibrated("p", "ttft")
    accuracy.forget("p")
    assert accuracy.error("p", "ttft") is None


def test_the_margin_finds_what_few_outcomes_exceed() -> None:
    """Lateness from -50 to 49 ms, one of each hundred outcomes above 48."""
    accuracy = Accuracy(Calibration())
    lateness = list(range(-50, 50)) * 40
    random.Random(1).shuffle(lateness)
    for ms in lateness:
        accuracy.observe_lateness("p", "ttft", 1000 * MS, (1000 + ms) * MS)
    margin_ms = accuracy.margin_ns("p", "ttft") / MS
    assert 35 <= margin_ms <= 70 and accuracy.margin_ns("p", "tbt") == 0.0
    for _ in range(1000):
        accuracy.observe_lateness("p", "ttft", 1000 * MS, 900 * MS)
    assert accuracy.margin_ns("p", "ttft") == 0.0
    accuracy.observe_lateness("p", "ttft", 1000 * MS, 2000 * MS)
    accuracy.forget("p")
    assert accuracy.margin_ns("p", "ttft") == 0.0


def test_a_margin_is_kept_for_what_comes_late() -> None:
    cluster = busy("placement")
    slo = Slo(ttft_ns=20 * MS)
    cluster.place(1, slo=slo)  # 2 ms are predicted
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 60 * MS))
    # 0.99 * 0.02 of 60 ms.
    assert refusal(cluster, 2, 180, slo=slo) == (
        "overloaded_ttft",
        "predicted TTFT 19.00 ms + margin 1.19 ms > objective 20.00 ms",
    )
    assert refusal(cluster, 3, 170, slo=slo) == ("", "")
    for request in range(4, 40):
        cluster.place(request)
        cluster.receive("f", PrefillDone(AttemptKey("f", request), 60 * MS))
        cluster.end(request)
    cluster.receive("f", PrefillDone(AttemptKey("f", 3), 18 * MS))
    assert refusal(cluster, 40, 140, slo=slo)[0] == "", "a quarter of the objective is the most that is kept"
    assert refusal(cluster, 41, 145, slo=slo)[0] == "overloaded_ttft"


@pytest.mark.parametrize("rule", ["baseline", "early", "early_predicted"])
def test_the_papers_rules_know_no_margin(rule: AdmissionRule) -> None:
    cluster = busy(rule)
    cluster.place(1)
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 60 * MS))
    assert refusal(cluster, 2, 190, slo=Slo(ttft_ns=20 * MS)) == ("", "")


def test_the_margin_of_tbt_is_from_what_frontends_saw() -> None:
    cluster = busy("placement")
    slo = Slo(tbt_ns=21 * MS)
    cluster.place(1, slo=slo)  # 20 ms are predicted
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 2 * MS))
    cluster.end(1, num_output=10, completed=True, mean_itl_ns=20 * MS, tbt_ns=100 * MS)
    assert cluster.place(2, slo=slo).decode == "d1"
    assert refusal(cluster, 3, slo=slo) == (
        "overloaded_tbt",
        "predicted TBT 20.00 ms + margin 1.98 ms > objective 21.00 ms",
    )


def test_the_wait_for_a_place_is_a_gap() -> None:
    """Eight places, ten sequences there: three eighths of the batch must end first, and a mean output takes 100 tokens of
    110 ms. Of ten tokens that gap is the longest tenth."""
    cluster = busy("placement", 10)
    cluster.core.view.lengths.mean = 100.0
    answer = cluster.answer(1, slo=Slo(tbt_ns=S))
    assert isinstance(answer, Rejected)
    wait_ms = (11 / 8 - 1) * 100 * 110
    assert answer.detail == f"predicted TBT {wait_ms - 2:.2f} ms > objective 1000.00 ms"
    assert refusal(busy("placement", 7), 2, slo=Slo(tbt_ns=S)) == ("", "")


def test_a_full_queue_is_told_at_once() -> None:
    cluster = Cluster(admission="off", num_queued_max=3)
    cluster.prefill("p", num_pages=100_000)
    cluster.decode("d", num_pages=100_000)
    for request in range(3):
        cluster.place(request, 10_000)
    answer = cluster.answer(3, 10)
    assert isinstance(answer, Rejected)
    assert (answer.reason, answer.detail) == (
        "queue_full",
        "the least loaded instance has as many requests as it takes: 3",
    )
    assert answer.retry_after_ns == 3 * (1001 * MS + 2 * MS)  # three steps of 4,096 tokens each
    cluster.place(4, 10, first=False)
    cluster.end(0)
    cluster.end(1)
    cluster.place(5, 10)


def test_one_tenant_never_has_all_places_of_a_queue() -> None:
    cluster = Cluster(admission="off", num_queued_max=8)
    cluster.prefill("p", num_pages=100_000)
    cluster.decode("d", num_pages=100_000)
    answers = [cluster.answer(request, 10, tenant="flood") for request in range(9)]
    assert [isinstance(answer, Rejected) for answer in answers] == [False] * 7 + [True] * 2
    cluster.place(9, 10, tenant="light")
    assert isinstance(cluster.answer(10, 10, tenant="light"), Rejected)
    for request in range(3):
        cluster.end(request)
    cluster.place(11, 10, tenant="light")


def test_retry_after_is_the_predicted_excess_within_bounds() -> None:
    def retry(num_tokens: int, slo: Slo) -> float:
        answer = busy("placement", 3).answer(1, num_tokens, slo=slo)
        assert isinstance(answer, Rejected)
        return answer.retry_after_ns / S

    assert retry(3_000, Slo(ttft_ns=1)) == 1.0
    cluster = busy("placement")
    cluster.core.view.instances["p"].booked_until = 50 * S
    cluster.core.view.instances["p"].set_work()
    answer = cluster.answer(1, slo=Slo(ttft_ns=20 * S))
    assert isinstance(answer, Rejected) and answer.retry_after_ns == 30 * S + 2 * MS
    # 10 ms too much, for the 256 tokens of a mean output.
    assert retry(10, Slo(tbt_ns=40 * MS)) == 2.56


# ---------------------------------------------------------------- who is refused first


def test_a_higher_class_is_refused_last() -> None:
    cluster = busy("placement")
    cluster.place(1, 100)
    slo = Slo(ttft_ns=20 * MS)  # 22 ms are predicted
    assert refusal(cluster, 2, 100, slo=slo)[0] == "overloaded_ttft"
    assert refusal(cluster, 3, 100, slo=slo, priority=1)[0] == ""
    assert refusal(cluster, 4, 10, slo=Slo(ttft_ns=30 * MS), priority=-1) == (
        "overloaded_ttft",
        "predicted TTFT 24.00 ms > objective 30.00 ms x 0.75 for class -1",
    )


def test_a_tenant_above_its_share_is_refused_before_one_below() -> None:
    cluster = busy("placement")
    for request in range(6):
        cluster.place(request, 100, tenant="big")
    cluster.place(6, 10, tenant="small")
    slo = Slo(ttft_ns=72 * MS)  # 70 ms are predicted
    assert refusal(cluster, 7, 10, tenant="big", slo=slo) == (
        "over_quota",
        "predicted TTFT 70.00 ms > objective 72.00 ms x 0.52 for a tenant above its share",
    )
    assert refusal(cluster, 8, 10, tenant="small", slo=slo)[0] == ""
    assert refusal(cluster, 9, 10, tenant="new", slo=slo)[0] == ""


def test_shares_decay_and_are_bounded() -> None:
    shares = Shares(Fairness(half_life_ns=10 * S, num_tenants_max=3))
    assert shares.ratio("a", 0) == 1.0
    shares.spend("a", 300, 0)
    assert (shares.ratio("a", 0), shares.ratio("b", 0)) == (1.0, 0.0)
    shares.spend("b", 100, 0)
    assert (shares.ratio("a", 0), shares.ratio("b", 0), shares.ratio("c", 0)) == (1.5, 0.5, 0.0)
    shares.spend("b", 200, 10 * S)  # a has 150 left of 300, b 50 + 200
    assert shares.ratio("a", 10 * S) == 2 * 150 / 400
    for tenant in ("c", "d", "e"):
        shares.spend(tenant, 10, 10 * S)
    assert len(shares) == 3 and shares.ratio("a", 10 * S) == 0.0
    shares.spend("f", 10, 1_000_000 * S)
    assert len(shares) == 1 and shares.ratio("f", 1_000_000 * S) == 1.0
    shares.spend("g", 30, 1_000_000 * S)
    assert shares.ratio("g", 1_000_000 * S) == 1.5
