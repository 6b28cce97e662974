import pytest

from mooncake.core.messages import LoadReport, PrefillDone, Rejected, StateChange
from mooncake.core.types import AttemptKey, CostModel, InstanceState
from mooncake.scheduler.answers import Answers
from mooncake.scheduler.lengths import Lengths
from tests.scheduler.cluster import COST, MS, Cluster, S, load


def run(cluster: Cluster, request: int, num_tokens: int, took_ns: int) -> None:
    """One prefill after the other, each so long."""
    cluster.place(request, num_tokens)
    cluster.now += took_ns
    cluster.receive("f", PrefillDone(AttemptKey("f", request), took_ns))
    cluster.end(request)


def test_a_slow_instance_is_priced_as_slow_until_it_is_not() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("d")
    for request in range(3):
        assert cluster.place(100 + request, 999).prediction.prefill_ns == int(100.9 * MS)
        cluster.end(100 + request)
        run(cluster, request, 999, 1009 * MS)  # ten times longer
    # (1009 + 50) / (100.9 + 50) is seven, and 1.5 to the power of 4 the next step below.
    assert cluster.place(10, 999).prediction.prefill_ns == int(100.9 * 1.5**4 * MS)
    cluster.end(10)
    run(cluster, 11, 999, 101 * MS)
    assert cluster.place(12, 999).prediction.prefill_ns == int(100.9 * MS), "one that is quick shows that it can"
    cluster.end(12)
    cluster.receive("p", StateChange("p", 1, InstanceState.READY, CostModel((2.0, 200.0, 0.0), COST.decode)))
    assert cluster.place(13, 999).prediction.prefill_ns == int(201.8 * MS), "the model was fitted anew"


def test_what_is_overdue_is_expected_to_take_as_long_again() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("d")
    cluster.place(1, 999)
    cluster.now = 150 * MS
    assert cluster.place(2, 99).prediction.queue_ns == 150 * MS - int(100.9 * MS)
    cluster.now = 160 * MS
    cluster.receive("f", PrefillDone(AttemptKey("f", 1), 160 * MS))
    assert cluster.place(3, 99).prediction.queue_ns == int(10.9 * MS)


def test_only_work_that_the_books_do_not_know_is_taken_from_reports() -> None:
    cluster = Cluster()
    cluster.prefill("p")
    cluster.decode("d")
    cluster.place(1, 999)
    cluster.receive("p", LoadReport(load("p", 1, num_waiting=1, waiting_tokens=999)))
    assert cluster.place(2, 99).prediction.queue_ns == int(100.9 * MS), "it is the one that was placed"
    cluster.receive("p", LoadReport(load("p", 2, num_waiting=4, waiting_tokens=3990)))
    # 400 ms for all four, so 200 for the two of an earlier Conductor.
    assert cluster.place(3, 99).prediction.queue_ns == 200 * MS
    cluster.receive("p", LoadReport(load("p", 3, num_waiting=3, waiting_tokens=1000)))
    assert cluster.place(4, 99).prediction.queue_ns == int((100.9 + 10.9 + 10.9) * MS)


def test_lengths_are_learnt() -> None:
    lengths = Lengths()
    assert (lengths.mean, lengths.mean_left) == (256.0, 256.0)
    for _ in range(2_000):
        lengths.learn(100)
    assert lengths.mean == pytest.approx(100) and lengths.mean_left == pytest.approx(50), "all alike: half is left"
    expected = [lengths.expect(limit, done) for limit, done in ((None, 0), (40, 0), (None, 99), (None, 500))]
    assert expected == [100, 40, 1, 1]
    for at in range(4_000):
        lengths.learn(10 if at % 2 else 1000)
    assert lengths.mean_left > 450, "who is met running is mostly a long one"


def test_answers_are_bounded_and_rejections_end() -> None:
    answers = Answers(2)
    refused = [Rejected(AttemptKey("f", at), "no_instance", "", 1 * S) for at in range(3)]
    for at, answer in enumerate(refused):
        answers.remember(answer.key, answer, at)
    assert [answers.find(answer.key, 10) for answer in refused] == [None, *refused[1:]]
    assert answers.find(refused[1].key, 1 * S + 1) is None and refused[1].key in answers
    answers.remember(refused[1].key, refused[1], 5 * S)
    answers.remember(refused[0].key, refused[0], 5 * S)
    assert refused[2].key not in answers and answers.find(refused[1].key, 5 * S) is not None
