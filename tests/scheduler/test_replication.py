from mooncake.core.messages import CopyBlocks, Message, PrefillDone
from mooncake.core.types import AttemptKey, KvSource
from mooncake.scheduler.config import Rates, ReplicationConfig
from tests.scheduler.cluster import MS, Cluster, S, blocks, messages

CONFIG = ReplicationConfig(
    num_uses_min=3, num_blocks_min=2, half_life_ns=30 * S, rest_ns=5 * S, nic_share=0.25, num_prefixes_max=3
)
SLOW = Rates(nic_bytes_per_s=40_000, remote_bytes_per_s=40_000)
"""A block of 4,000 bytes passes a NIC in 0.1 s."""


class Hot:
    """Node n0 has the prefix 1, 2, 3 and, as p0 is busy, others pull it. Requests are over before the next one comes."""

    def __init__(self, rates: Rates = SLOW, **config: object) -> None:
        self.cluster = Cluster(policy="joint", replicate=True, replication=CONFIG, rates=rates, **config)
        for at in range(3):
            self.cluster.node(f"n{at}", *((1, 2, 3) if at == 0 else ()))
            self.cluster.prefill(f"p{at}", node=f"n{at}", shard=b"s")
        self.cluster.decode("d")
        self.request = 0

    def use(self, *numbers: int) -> list[tuple[str, Message]]:
        """The copies that the placement asks for."""
        self.request += 1
        asked = messages(self.cluster.ask(self.request, 4 * len(numbers) + 1, *numbers), CopyBlocks)
        self.cluster.receive("f", PrefillDone(AttemptKey("f", self.request)))
        self.cluster.end(self.request)
        self.cluster.core.index.expire(10**18)
        return asked


def copy(target: str) -> tuple[str, Message]:
    source = KvSource("n0", 12, blocks(1, 2, 3), addresses=("unix:n0",))
    return target, CopyBlocks(source, b"s")


def test_a_hot_prefix_is_copied_to_the_node_with_the_least_booked() -> None:
    hot = Hot()
    hot.cluster.core.view.links.in_until[hot.cluster.core.view.slot("n1")] = 1 * S
    assert [hot.use(1, 2, 3, at) for at in (11, 12)] == [[], []]
    # Three uses of 0.3 s are less than a quarter of 30 s, but n0 has been asked for more than it can send.
    hot.cluster.core.view.links.out_until[hot.cluster.core.view.slot("n0")] = 60 * MS
    assert hot.use(1, 2, 3, 13) == [copy("n2")]
    assert hot.use(1, 2, 3, 14) == [], "it rests"
    hot.cluster.now = 6 * S
    hot.cluster.core.view.links.out_until[hot.cluster.core.view.slot("n0")] = 7 * S
    assert hot.use(1, 2, 3, 15) == [copy("n1")]


def test_a_copy_is_booked_on_both_nics() -> None:
    hot = Hot()
    links, slot = hot.cluster.core.view.links, hot.cluster.core.view.slot
    for at in (11, 12):
        hot.use(1, 2, 3, at)
    links.out_until[slot("n0")], links.in_until[slot("n1")] = 60 * MS, 1 * S
    assert hot.use(1, 2, 3, 13) == [copy("n2")]
    # 0.3 s; the placement itself read from n0's own machine.
    assert (links.out_until[slot("n0")], links.in_until[slot("n2")]) == (360 * MS, 300 * MS)


def test_a_prefix_that_asks_too_much_of_its_holders_is_copied_before_they_are_behind() -> None:
    hot = Hot()
    found = [hot.use(1, 2, 3, at) for at in range(11, 40)]
    assert [at for at, wishes in enumerate(found) if wishes] == [25], "26 uses of 0.3 s are more than a quarter of 30 s"


def test_nobody_is_left_to_copy_to() -> None:
    hot = Hot()
    for at in (1, 2):
        hot.cluster.delta(f"n{at}", 1, "dram", added=(1, 2, 3))
    assert not any(hot.use(1, 2, 3, at) for at in range(11, 90))


def test_short_and_cold_prefixes_are_not_copied() -> None:
    hot = Hot()
    hot.cluster.core.view.links.out_until[hot.cluster.core.view.slot("n0")] = 10_000 * S
    assert not any(hot.use(1, 8, at) for at in range(11, 20)), "one block only"
    for at in range(11, 20):
        assert not hot.use(1, 2, 3, at), "once in two minutes"
        hot.cluster.now += 120 * S


def test_the_table_is_bounded_and_off_is_off() -> None:
    hot = Hot()
    for at in range(10):
        hot.cluster.delta("n0", at + 1, "dram", added=(100 + at, 200 + at))
        hot.use(100 + at, 200 + at)
    assert len(hot.cluster.core.placer._replication) == 3  # type: ignore[arg-type]
    off = Cluster(policy="joint", replication=CONFIG)
    off.node("n0", 1, 2, 3)
    off.prefill("p0", node="n0")
    off.decode("d")
    for request in range(50):
        assert messages(off.ask(request, 17, 1, 2, 3), CopyBlocks) == []
