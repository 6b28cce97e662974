from mooncake.core.messages import Prediction
from mooncake.core.types import Slo
from mooncake.scheduler.admission import Accuracy, HardAdmission, NoAdmission, SoftAdmission
from mooncake.scheduler.config import Calibration
from tests.scheduler.cluster import MS, S

LATE = Prediction(queue_ns=4 * S, ttft_ns=5 * S, tbt_ns=20 * MS)


def test_breaches_name_the_objective_and_the_wait() -> None:
    off = NoAdmission()
    ttft = off.judge(Slo(ttft_ns=2 * S), LATE, "p", "d")
    assert (ttft.reason, ttft.enforced, ttft.retry_after_ns) == ("overloaded_ttft", False, 3 * S)
    assert ttft.detail == "predicted TTFT 5000.0 ms > objective 2000.0 ms"
    tbt = off.judge(Slo(ttft_ns=5 * S, tbt_ns=10 * MS), LATE, "p", "d")
    assert (tbt.reason, tbt.retry_after_ns) == ("overloaded_tbt", 4 * S)
    assert off.judge(Slo(), LATE, "p", "d").reason == ""
    assert off.judge(Slo(ttft_ns=1), Prediction(ttft_ns=2), "p", "d").retry_after_ns == 1 * S
    assert off.judge(Slo(ttft_ns=1), Prediction(ttft_ns=900 * S), "p", "d").retry_after_ns == 60 * S


def test_soft_admission_waits_until_the_instance_is_calibrated() -> None:
    accuracy = Accuracy(Calibration(num_outcomes_min=3, relative_error_max=0.2))
    soft = SoftAdmission(accuracy)

    def enforced() -> bool:
        return soft.judge(Slo(ttft_ns=2 * S), LATE, "p", "d").enforced

    for _ in range(3):
        assert not enforced()
        accuracy.observe("p", "ttft", 110 * MS, 100 * MS)
    assert enforced()
    assert not soft.judge(Slo(tbt_ns=10 * MS), LATE, "p", "d").enforced
    accuracy.observe("p", "ttft", 500 * MS, 100 * MS)
    assert accuracy.error("p", "ttft") == (0.1 * 3 + 4) / 4 and not enforced()
    accuracy.forget("p")
    assert accuracy.error("p", "ttft") is None


def test_hard_admission_refuses_from_the_first_request_on() -> None:
    hard = HardAdmission()
    assert hard.judge(Slo(ttft_ns=2 * S), LATE, "p", "d").enforced
    assert not hard.judge(Slo(), LATE, "p", "d").enforced
