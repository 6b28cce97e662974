from mooncake.core.messages import CacheDelta, CacheSnapshot, Send, SnapshotRequest
from mooncake.core.types import Tier
from mooncake.scheduler.feeds import CacheFeeds
from mooncake.scheduler.prefix_index import ANY, FAST, PrefixIndex
from tests.scheduler.cluster import blocks

ASK = [Send("n", SnapshotRequest("n", "dram"))]


class Feed:
    def __init__(self) -> None:
        self.index = PrefixIndex(100)
        self.feeds = CacheFeeds(self.index, retry_ns=10)
        self.slot = self.index.add_holder()
        self.opened = self.feeds.open("n", 1, self.slot, Tier.DRAM, 0)

    def delta(
        self, seq: int, *added: int, removed: tuple[int, ...] = (), epoch: int = 1, tier: str = "dram"
    ) -> list[Send]:
        return self.feeds.on_delta(CacheDelta("n", epoch, seq, tier, blocks(*added), blocks(*removed)), 0)

    def snapshot(self, seq: int, *keys: int, epoch: int = 1) -> None:
        self.feeds.on_snapshot(CacheSnapshot("n", epoch, seq, "dram", blocks(*keys)))

    def held(self, level: int = FAST) -> list[int]:
        return [n for n in range(10) if self.index.match(blocks(n)).lengths[level, self.slot]]


def test_opening_asks_for_a_snapshot_and_deltas_follow_it() -> None:
    feed = Feed()
    assert feed.opened == ASK
    feed.snapshot(5, 1, 2)
    assert feed.delta(6, 3, removed=(1,)) == []
    assert feed.held() == [2, 3]


def test_duplicates_and_other_lives_change_nothing() -> None:
    feed = Feed()
    feed.delta(1, 1)
    feed.delta(2, removed=(1,))
    feed.delta(1, 1)
    feed.delta(3, 4, epoch=0)
    feed.snapshot(1, 5)
    feed.snapshot(9, 5, epoch=2)
    assert feed.held() == [] and feed.feeds.num_stale == 4
    feed.feeds.on_delta(CacheDelta("stranger", 1, 1, "dram", blocks(1), ()), 0)
    feed.delta(3, 1, tier="tape")
    assert feed.held() == [] and feed.feeds.num_stale == 6


def test_gap_asks_once_and_the_snapshot_repairs_it() -> None:
    feed = Feed()
    feed.snapshot(1, 1)
    assert feed.delta(3, 3) == ASK
    assert feed.delta(4, 4) == []
    assert feed.held() == [1]
    feed.snapshot(4, 3, 4)
    feed.delta(5, 5)
    assert feed.held() == [3, 4, 5]


def test_unanswered_snapshot_requests_are_repeated() -> None:
    feed = Feed()
    assert feed.feeds.deadline() == 10
    assert feed.feeds.retry(9) == [] and feed.feeds.retry(10) == ASK
    assert feed.feeds.deadline() == 20
    feed.snapshot(0)
    assert feed.feeds.deadline() is None


def test_tiers_are_streams_of_their_own() -> None:
    feed = Feed()
    feed.delta(1, 1)
    feed.delta(1, 1, 2, tier="ssd")
    assert feed.held(FAST) == [1] and feed.held(ANY) == [1, 2]
