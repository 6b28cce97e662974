import pytest

from mooncake.core.messages import LoadReport, PrefillDone
from mooncake.core.types import AttemptKey, Role
from mooncake.scheduler.config import RolesConfig
from mooncake.scheduler.roles import Roles, Sample, SwitchRole, take_sample
from tests.scheduler.cluster import MS, Cluster, S, load

CONFIG = RolesConfig(num_samples=3, rest_ns=30 * S, drain_ns=120 * S)


class Pools:
    """Instances that change their role as soon as they are told, or after a while."""

    def __init__(self, num_prefill: int, num_decode: int, config: RolesConfig = CONFIG, drain_ns: int = 0) -> None:
        self.prefill = [f"p{i}" for i in range(num_prefill)]
        self.decode = [f"d{i}" for i in range(num_decode)]
        self.roles = Roles(config)
        self.drain_ns = drain_ns
        self.now = 0
        self.leaving: tuple[int, SwitchRole] | None = None
        self.switches: list[SwitchRole] = []

    def observe(self, prefill: float, decode: float, **more: float) -> SwitchRole | None:
        """A sample every ten seconds."""
        self.now += 10 * S
        if self.leaving is not None and self.leaving[0] <= self.now:
            switch, self.leaving = self.leaving[1], None
            (self.prefill if switch.role is Role.PREFILL else self.decode).append(switch.name)
        switched = self.roles.observe(
            Sample(prefill, decode, tuple(self.prefill), tuple(self.decode), **more), self.now
        )
        if switched is not None:
            self.switches.append(switched)
            (self.decode if switched.role is Role.PREFILL else self.prefill).remove(switched.name)
            self.leaving = self.now + self.drain_ns, switched
        return switched


def test_lasting_pressure_moves_the_least_loaded_instance() -> None:
    pools = Pools(2, 4)
    assert [pools.observe(1.5, 0.2) for _ in range(3)] == [None, None, SwitchRole("d0", Role.PREFILL)]


def test_a_short_peak_moves_nobody() -> None:
    pools = Pools(2, 4)
    for _ in range(20):
        assert pools.observe(1.5, 0.2) is None and pools.observe(1.5, 0.2) is None and pools.observe(0.5, 0.2) is None


def test_a_pool_gives_only_what_it_can_spare() -> None:
    pools = Pools(2, 2)
    for _ in range(10):
        assert pools.observe(1.5, 0.36) is None, "0.36 on two is 0.72 on one"
    for _ in range(2):
        assert pools.observe(1.5, 0.35) is None
    assert pools.observe(1.5, 0.35) == SwitchRole("d0", Role.PREFILL)


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(4, 1), (1, 4), (1, 1)])
def test_pools_keep_their_least_size(num_prefill: int, num_decode: int) -> None:
    pools = Pools(num_prefill, num_decode)
    for _ in range(20):
        pools.observe(2.0, 0.0) if num_decode == 1 else pools.observe(0.0, 2.0)
    assert pools.switches == []


def test_missed_objectives_are_pressure() -> None:
    pools = Pools(4, 2)
    for _ in range(2):
        assert pools.observe(0.1, 0.5, attained_tbt=0.8) is None
    assert pools.observe(0.1, 0.5, attained_tbt=0.8) == SwitchRole("p0", Role.DECODE)
    pools = Pools(4, 2)
    for _ in range(10):
        assert pools.observe(0.1, 0.5, attained_tbt=0.8, attained_ttft=0.8) is None, "both suffer: nobody can spare one"


def test_nothing_is_decided_while_one_drains_and_rests() -> None:
    pools = Pools(2, 6, drain_ns=60 * S)
    decided = [pools.observe(1.5, 0.1) is not None for _ in range(30)]
    times = [10 * (at + 1) for at, yes in enumerate(decided) if yes]
    # 50 s until it is seen again, 30 s rest from then on, three samples.
    assert times == [30, 140, 250]


def test_a_failed_switch_is_given_up() -> None:
    pools = Pools(2, 6, drain_ns=100_000 * S)
    decided = [pools.observe(1.5, 0.1) is not None for _ in range(30)]
    assert decided.count(True) == 2


def test_who_is_ready_in_its_old_role_again_has_not_switched() -> None:
    pools = Pools(2, 6, drain_ns=100_000 * S)
    for _ in range(3):
        switch = pools.observe(1.5, 0.1)
    assert switch == SwitchRole("d0", Role.PREFILL)
    assert pools.observe(1.5, 0.1) is None, "it drains"
    pools.decode.append("d0")  # it died and was started again
    decided = [pools.observe(1.5, 0.1) is not None for _ in range(6)]
    assert decided == [False, False, False, False, False, True], "seen, 30 s of rest, three samples"


@pytest.mark.parametrize("empty", [Role.PREFILL, Role.DECODE])
def test_an_empty_pool_gets_an_instance_of_the_other(empty: Role) -> None:
    pools = Pools(2, 2)
    assert pools.observe(0.1, 0.1) is None
    lost = pools.prefill if empty is Role.PREFILL else pools.decode
    lost.clear()
    assert [pools.observe(0.0, 0.0) for _ in range(2)] == [None, None]
    assert pools.observe(0.0, 0.0) == SwitchRole("d0" if empty is Role.PREFILL else "p0", empty)


def test_nobody_switches_for_a_pool_that_is_still_to_come_or_as_the_last_of_its_own() -> None:
    starting, last = Pools(2, 0), Pools(1, 1)
    assert not any(starting.observe(0.0, 0.0) for _ in range(20))
    last.observe(0.1, 0.1)
    last.prefill.clear()
    assert not any(last.observe(0.0, 0.0) for _ in range(20))


@pytest.mark.parametrize("half_period", [3, 6, 12, 30])
def test_a_square_wave_is_not_followed(half_period: int) -> None:
    """An hour and more of load that swings between the pools: the patience outgrows the wave."""
    pools = Pools(4, 4)
    last: list[int] = []
    for at in range(2_000):
        high = at // half_period % 2 == 0
        if pools.observe(1.5 if high else 0.1, 0.1 if high else 1.5) is not None:
            last.append(at)
    assert len(pools.switches) <= 12 and last[-1] < 300


def test_a_lasting_change_is_followed_again_after_a_wave() -> None:
    pools = Pools(4, 4)
    for at in range(60):
        pools.observe(1.5 if at // 6 % 2 else 0.1, 0.1 if at // 6 % 2 else 1.5)
    before = len(pools.switches)
    for _ in range(200):
        pools.observe(1.5, 0.1)
    assert len(pools.switches) > before and pools.switches[-1].role is Role.PREFILL


def test_after_a_long_calm_the_patience_is_as_at_the_beginning() -> None:
    pools = Pools(4, 4)
    for at in range(60):
        pools.observe(1.5 if at // 6 % 2 else 0.1, 0.1 if at // 6 % 2 else 1.5)
    for _ in range(361):
        pools.observe(0.1, 0.1)
    assert [pools.observe(1.5, 0.1) for _ in range(3)][-1] is not None


def test_a_sample_is_the_pools_as_they_are() -> None:
    cluster = Cluster(policy="joint")
    assert take_sample(cluster.core.view, CONFIG, 1.0, 1.0, 0) is None
    cluster.prefill("p0")
    cluster.prefill("p1")
    assert take_sample(cluster.core.view, CONFIG, 1.0, 1.0, 0) == Sample(0.0, 0.0, ("p0", "p1"), ())
    cluster.decode("d0")
    cluster.decode("d1")
    cluster.receive("d0", LoadReport(load("d0", 1, num_running=4)))
    cluster.place(1, 999)  # 100 ms at p0
    sample = take_sample(cluster.core.view, RolesConfig(ttft_ns=100 * MS, tbt_ns=1 * S), 1.0, 0.5, 0)
    assert sample is not None
    assert (sample.prefill, sample.prefill_names) == (0.5045, ("p1", "p0"))
    # d0: 4 of 8 in the batch; d1: a step of 10 ms, as what is booked there waits for its prefill.
    assert (sample.decode, sample.decode_names) == ((0.5 + 0.01) / 2, ("d1", "d0"))
    cluster.receive("f", PrefillDone(AttemptKey("f", 1)))
    later = take_sample(cluster.core.view, RolesConfig(ttft_ns=100 * MS, tbt_ns=1 * S), 1.0, 0.5, 0)
    # d1: 253 of 1,000 pages booked.
    assert later is not None and (later.prefill, later.decode) == (0.0, (0.5 + 0.253) / 2)
