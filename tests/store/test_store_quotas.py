"""Tenants' quotas: whose objects go, what is refused, what the nodes know of each other, and what a restart remembers."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake.config import format_quotas, load_config, parse_quotas
from mooncake.core.errors import ConfigError, ProtocolError
from mooncake.core.messages import NodeInfo
from mooncake.store import wire
from mooncake.store.api import PutResult, Store
from mooncake.store.client import StoreClient
from mooncake.store.directory.core import (
    DirectoryConfig,
    DirectoryCore,
    Elsewhere,
    Gone,
    Registered,
    Snapshot,
    Tick,
    Uses,
)
from mooncake.store.events import (
    Adopted,
    ClientGone,
    ClientTenant,
    Commit,
    Exists,
    Flush,
    Grant,
    Lease,
    Name,
    ReadSsd,
    Release,
    Remove,
    Report,
    Reserve,
    SnapshotWanted,
    SsdRead,
    SsdWritten,
    Usage,
    UsedElsewhere,
    WriteSsd,
    fault_of,
)
from mooncake.store.node import StoreNode
from mooncake.store.ssd import SsdConfig
from mooncake.store.types import CommitStatus, PutStatus
from mooncake.transport.frames import FrameReader
from tests.store.helpers import (
    TOKEN,
    UNIT,
    Driver,
    die,
    eventually,
    key,
    keys,
    node_config,
    run,
    running_node,
    ten_objects,
)
from tests.store.ssd import tiered
from tests.store.test_store_directory import cluster

ALICE, BOB, NOBODY = 1, 2, 3
"""Clients. Alice may have four objects, Bob three."""


def two_tenants(**options: Any) -> Driver:
    drive = Driver(ten_objects(quotas={"alice": 4 * UNIT, "bob": 3 * UNIT}, **options))
    drive(ClientTenant(ALICE, "alice"))
    drive(ClientTenant(BOB, "bob"))
    drive(ClientTenant(NOBODY, "carol"))  # who has no quota
    return drive


def put(drive: Driver, client: int, *numbers: int, lease: bool = False, whole: bool = False) -> list[str]:
    puts = drive(Reserve(client, 0, keys(*numbers), (UNIT,) * len(numbers), all_or_nothing=whole))
    made = tuple([each.location.generation for each in puts if each.status is PutStatus.RESERVED])
    if made:
        drive(Commit(client, 0, made, lease))
    return [each.status.name for each in puts]


def there(drive: Driver, *numbers: int) -> list[int]:
    return [number for number, is_there in zip(numbers, drive(Exists(9, 0, keys(*numbers))), strict=True) if is_there]


def used(drive: Driver) -> dict[str, int]:
    return {tenant.name: tenant.used // UNIT for tenant in drive.core.tenants()}


def test_a_full_quota_makes_room_by_the_tenants_own_oldest_suffix_first() -> None:
    drive = two_tenants()
    put(drive, BOB, 20, 21)
    put(drive, NOBODY, 30)
    put(drive, ALICE, 1, 2)
    put(drive, ALICE, 3, 4)
    assert used(drive) == {"alice": 4, "bob": 2}
    assert put(drive, ALICE, 5) == ["RESERVED"]
    assert there(drive, 1, 2, 3, 4, 5, 20, 21, 30) == [1, 3, 4, 5, 20, 21, 30], "the older chain's suffix"
    [leased] = drive(Lease(BOB, 0, keys(1)))
    drive(Release(BOB, 0, (leased.generation,)))
    assert put(drive, ALICE, 6) == ["RESERVED"]
    assert there(drive, 1, 3, 4, 5, 6) == [1, 3, 5, 6], "a use by anybody counts"
    assert used(drive) == {"alice": 4, "bob": 2} and drive.core.metrics()["evictions"] == 2


def test_leased_objects_stay_and_what_exceeds_the_quota_is_refused() -> None:
    drive = two_tenants()
    assert put(drive, BOB, 1, 2, lease=True) == ["RESERVED"] * 2
    assert put(drive, BOB, 3, 4, 5) == ["RESERVED", "REFUSED", "REFUSED"]
    assert put(drive, BOB, 6, 7, whole=True) == ["REFUSED", "REFUSED"]
    assert there(drive, 1, 2, 3) == [1, 2, 3], "nothing goes in vain"
    assert put(drive, BOB, 8, 1) == ["RESERVED", "EXISTS"], "what exists costs nothing"
    assert put(drive, NOBODY, *range(10, 17)) == ["RESERVED"] * 7, "others have what is left"
    bob = drive.core.tenants()[1]
    assert (bob.num_refused, bob.num_evictions) == (4, 1)


def test_what_goes_for_a_quota_is_not_counted_as_gone_for_room() -> None:
    drive = tiered(10, 8, quotas={"bob": 3 * UNIT})
    drive(ClientTenant(BOB, "bob"))
    assert put(drive, BOB, 1, 2) + put(drive, BOB, 3, 4) + put(drive, BOB, 5) == ["RESERVED"] * 5
    [bob] = drive.core.tenants()
    metrics = drive.core.metrics()
    assert (metrics["evictions"], bob.num_evictions, metrics["ssd_objects"]) == (2, 2, 0)
    assert metrics["lost_evictions"] == 0


def test_what_others_need_takes_a_tenants_objects_too_and_gives_the_bytes_back() -> None:
    drive = two_tenants()
    put(drive, ALICE, 1, 2, 3, 4)
    assert put(drive, NOBODY, *range(10, 19)) == ["RESERVED"] * 9
    assert used(drive) == {"alice": 1, "bob": 0}
    drive(Remove(NOBODY, 0, keys(1)))
    reserved = drive(Reserve(ALICE, 0, keys(5), (UNIT,)))
    assert used(drive)["alice"] == 1 and reserved[0].status is PutStatus.RESERVED
    drive(ClientGone(ALICE))
    assert used(drive)["alice"] == 0, "a reservation counts as long as it lasts"


def test_granted_space_counts_from_the_grant_on() -> None:
    drive = two_tenants()
    granted = drive(Grant(BOB, 0, (UNIT,) * 4))
    assert [each is None for each in granted] == [False, False, False, True] and used(drive)["bob"] == 3
    numbers = tuple([each.generation for each in granted[:3]])
    drive(Name(BOB, 0, keys(1, 2, 3), numbers, (UNIT,) * 3))
    assert used(drive)["bob"] == 3
    assert drive(Grant(BOB, 0, (UNIT,)))[0] is not None and there(drive, 1, 2, 3) == [1, 2]


def test_what_the_tenant_has_elsewhere_leaves_it_less_here() -> None:
    drive = two_tenants()
    drive(UsedElsewhere({"alice": 3 * UNIT, "carol": 99 * UNIT}))
    assert put(drive, ALICE, 1, 2) == ["RESERVED", "REFUSED"]
    drive(UsedElsewhere({"alice": 9 * UNIT}))
    assert put(drive, ALICE, 3) == ["REFUSED"] and there(drive, 1) == []
    drive(UsedElsewhere({}))
    assert put(drive, ALICE, 4, 5, 6, 7) == ["RESERVED"] * 4


def test_usage_is_told_when_it_changes_and_with_each_snapshot() -> None:
    drive = two_tenants()
    put(drive, ALICE, 1, 2)
    drive(Flush())
    assert [each for each in drive.reports if isinstance(each, Usage)][-1] == Usage(7, {"alice": 2 * UNIT})
    drive.reports.clear()
    drive(Flush())
    assert not drive.reports
    drive(SnapshotWanted())
    assert drive.reports[-1] == Usage(7, {"alice": 2 * UNIT})


def test_objects_of_a_life_before_keep_their_owner() -> None:
    drive = two_tenants()
    [alice, _] = drive.core.tenants()
    numbers = (101, 102, 103)
    drive(Adopted(keys(1, 2, 3), (UNIT,) * 3, (0, UNIT, 2 * UNIT), numbers, (None,) * 3, (alice.code, 0, alice.code)))
    assert used(drive) == {"alice": 2, "bob": 0}
    assert put(drive, ALICE, 4, 5, 6) == ["RESERVED"] * 3
    assert there(drive, 1, 2, 3) == [2, 3], "the first are the oldest"


def test_quotas_are_of_memory_and_what_is_read_back_from_ssd_counts_for_who_wanted_it() -> None:
    drive = two_tenants(ssd=SsdConfig(1 << 20, extent_bytes=1 << 16, alignment=UNIT, ready_bytes=4 * UNIT))
    put(drive, ALICE, 1, 2, 3, 4)
    put(drive, NOBODY, *range(10, 14))  # six rooms short of ready: the oldest are written
    written = [each for each in drive.reports if isinstance(each, WriteSsd)]
    assert written
    for each in written:
        drive(SsdWritten(each.job))
    assert put(drive, ALICE, 5, 6, 7, 8) == ["RESERVED"] * 4 and used(drive)["alice"] == 4
    assert there(drive, 1, 2, 3, 4) == [3, 4], "on SSD still"
    drive.reports.clear()
    drive(Lease(BOB, 0, keys(3)))
    for each in [each for each in drive.reports if isinstance(each, ReadSsd)]:
        drive(SsdRead(each.job))
    assert used(drive) == {"alice": 4, "bob": 1}


# ---------------------------------------------------------------- a client that puts for many

ENGINE = 4


def hand_over(drive: Driver, tenant: str, *numbers: int) -> tuple[int, ...]:
    """Put, as prefill does, and keep leased: all of it has to be there. The numbers of the leases."""
    request = Reserve(
        ENGINE, 0, keys(*numbers), (UNIT,) * len(numbers), lease_existing=True, all_or_nothing=True, tenant=tenant
    )
    puts = drive(request)
    assert all(each.location is not None for each in puts)
    made = tuple([each.location.generation for each in puts if each.status is PutStatus.RESERVED])
    if made:
        assert drive(Commit(ENGINE, 0, made, True)) == (CommitStatus.COMMITTED,) * len(made)
    return tuple([each.location.generation for each in puts])


def listed(drive: Driver) -> set[bytes]:
    """What the directory believes to be there."""
    found: set[bytes] = set()
    for each in drive.reports:
        if isinstance(each, Report):
            found = (found | set(each.added)) - set(each.removed)
    return found


def test_what_a_hand_over_has_beyond_the_quota_can_be_read_and_is_not_kept() -> None:
    drive = two_tenants()
    put(drive, BOB, 20, 21)
    held = hand_over(drive, "alice", 1, 2, 3, 4, 5, 6)
    assert used(drive) == {"alice": 6, "bob": 2}, "in flight it counts"
    assert listed(drive) == set(keys(20, 21, 1, 2, 3, 4)), "nobody is told of what will not stay"
    read = drive(Lease(NOBODY, 0, keys(1, 2, 3, 4, 5, 6)))
    drive(Release(ENGINE, 0, held))
    assert there(drive, *range(1, 7)) == [1, 2, 3, 4, 5, 6], "somebody reads it"
    drive(Release(NOBODY, 0, tuple([each.generation for each in read])))
    assert there(drive, *range(1, 7), 20, 21) == [1, 2, 3, 4, 20, 21], "the leading part"
    assert used(drive) == {"alice": 4, "bob": 2} and drive.core.tenants()[0].num_refused == 2
    drive(Flush())
    assert listed(drive) == set(keys(20, 21, 1, 2, 3, 4))


def test_a_hand_over_takes_the_place_of_its_tenants_oldest() -> None:
    drive = two_tenants()
    put(drive, BOB, 20, 21, 22)
    for chain in ((1, 2), (3, 4)):
        drive(Release(ENGINE, 0, hand_over(drive, "alice", *chain)))
    drive(Release(ENGINE, 0, hand_over(drive, "alice", 3, 4, 5)))
    assert there(drive, 1, 2, 3, 4, 5, 20, 21, 22) == [1, 3, 4, 5, 20, 21, 22], "what it reuses costs nothing"
    drive(Release(ENGINE, 0, hand_over(drive, "alice", 11, 12, 13, 14, 15)))
    assert there(drive, 1, 3, 4, 5, *range(11, 16), 20, 21, 22) == [11, 12, 13, 14, 20, 21, 22]
    assert used(drive) == {"alice": 4, "bob": 3}
    assert drive.core.metrics()["refusals"] == 0


def test_hand_overs_of_several_requests_count_together() -> None:
    drive = two_tenants()
    first, second = hand_over(drive, "bob", 1, 2), hand_over(drive, "bob", 3, 4)
    assert used(drive)["bob"] == 4
    drive(Release(ENGINE, 0, second))
    assert there(drive, 1, 2, 3, 4) == [1, 2, 3]
    drive(Release(ENGINE, 0, first))
    assert there(drive, 1, 2, 3) == [1, 2, 3] and used(drive)["bob"] == 3


def test_whoever_is_named_pays_and_the_others_have_no_limit() -> None:
    drive = two_tenants()
    reserve = Reserve(BOB, 0, keys(1), (UNIT,), tenant="alice")
    drive(reserve)
    assert used(drive) == {"alice": 1, "bob": 0}, "in place of the client's own"
    assert len(hand_over(drive, "carol", *range(10, 19))) == 9 and used(drive) == {"alice": 1, "bob": 0}


def test_a_store_that_is_full_of_what_is_in_use_refuses_a_hand_over_as_ever() -> None:
    drive = two_tenants()
    put(drive, NOBODY, *range(10, 18), lease=True)
    request = Reserve(ENGINE, 0, keys(1, 2, 3), (UNIT,) * 3, all_or_nothing=True, tenant="bob")
    assert [each.status for each in drive(request)] == [PutStatus.REFUSED] * 3 and used(drive)["bob"] == 0


def test_the_partial_last_object_is_gone_with_its_leases_whatever_the_quota() -> None:
    drive = two_tenants()
    request = Reserve(ENGINE, 0, keys(1, 2), (UNIT,) * 2, all_or_nothing=True, ephemeral_last=True, tenant="alice")
    numbers = tuple([each.location.generation for each in drive(request)])
    drive(Commit(ENGINE, 0, numbers, True))
    drive(Release(ENGINE, 0, numbers))
    assert there(drive, 1, 2) == [1] and used(drive)["alice"] == 1
    assert drive.core.tenants()[0].num_refused == 0


def test_what_is_read_back_from_ssd_counts_for_who_is_named() -> None:
    drive = two_tenants(ssd=SsdConfig(1 << 20, extent_bytes=1 << 16, alignment=UNIT, ready_bytes=4 * UNIT))
    put(drive, ALICE, 1, 2, 3, 4)
    put(drive, NOBODY, *range(10, 14))
    for each in [each for each in drive.reports if isinstance(each, WriteSsd)]:
        drive(SsdWritten(each.job))
    put(drive, ALICE, 5, 6, 7, 8)
    assert there(drive, 3) == [3] and used(drive) == {"alice": 4, "bob": 0}
    drive(Lease(ENGINE, 0, keys(3), tenant="bob"))
    assert used(drive) == {"alice": 4, "bob": 1}


def test_tenants_go_with_requests_only_to_nodes_that_charge_them() -> None:
    events = [
        Reserve(5, 6, keys(1, 2), (UNIT, UNIT), checksums=(7, 8), ephemeral_last=True, tenant="alïce"),
        Lease(5, 6, keys(1, 2), "alïce"),
    ]
    for event in events:
        frame = FrameReader(wire.MAX_CONTROL_BYTES).feed(wire.encode_request(event))[0]
        assert wire.decode_request(5, frame) == event
        for payload in (frame.payload[: -len("alïce".encode())], frame.payload + b"x" * 256, frame.payload + b"\xff"):
            with pytest.raises(ProtocolError, match="tenant's name"):
                wire.decode_request(5, msgspec.structs.replace(frame, payload=payload))
    assert fault_of(Lease(0, 0, keys(1), "x" * 257), 1) == "tenant: must have at most 256 bytes, got 257"

    async def main(**options: Any) -> list[str]:
        async with running_node(**options) as node:
            client = await StoreClient.connect(node.addresses[:1], token=TOKEN, name="engine")
            seen: list[str] = []
            handle = node.handle

            def watched(event: Any) -> None:
                seen.extend([event.tenant] if isinstance(event, Reserve | Lease) else [])
                handle(event)

            node.handle = watched  # type: ignore[method-assign]
            await client.reserve(keys(1), (UNIT,), tenant="alice")
            await client.lease(keys(9), tenant="alice")
            await client.close()
            return seen

    assert asyncio.run(main()) == ["", ""]
    assert asyncio.run(main(quotas={"bob": UNIT})) == ["alice", "alice"]


@pytest.mark.parametrize("seed", range(4))
def test_no_history_of_hand_overs_keeps_more_than_the_quota(seed: int) -> None:
    rng, drive = random.Random(seed), two_tenants()
    held: list[tuple[int, ...]] = []
    for _ in range(600):
        drive.now += 1
        if held and (len(held) == 3 or rng.random() < 0.5):
            drive(Release(ENGINE, 0, held.pop(rng.randrange(len(held)))))
        else:
            first = rng.randrange(20)
            chain = tuple(range(first, first + rng.randrange(1, 4)))
            held.append(hand_over(drive, rng.choice(("alice", "bob", "carol")), *chain))
    while held:
        drive(Release(ENGINE, 0, held.pop()))
    assert all(tenant.used <= tenant.quota for tenant in drive.core.tenants())
    assert any(tenant.num_refused for tenant in drive.core.tenants())


@pytest.mark.parametrize("seed", range(4))
def test_the_books_are_right_after_any_history(seed: int) -> None:
    """`Driver` checks all conservation laws after every event, the quotas' among them."""
    rng, drive = random.Random(seed), two_tenants(reservation_ns=50)
    claims: dict[int, list[int]] = {client: [] for client in (ALICE, BOB, NOBODY)}
    for _ in range(1500):
        drive.now += 1
        client = rng.choice(list(claims))
        match rng.randrange(6):
            case 0 | 1:
                put(drive, client, *rng.sample(range(30), rng.randrange(1, 4)), whole=rng.random() < 0.3)
            case 2:
                drive(Reserve(client, 0, keys(rng.randrange(30)), (rng.randrange(1, 3 * UNIT),)))
            case 3:
                found = drive(Lease(client, 0, keys(rng.randrange(30))))
                claims[client] += [each.generation for each in found if each is not None]
            case 4:
                for number in claims[client]:
                    drive(Release(client, 0, (number,)))
                claims[client].clear()
            case _:
                drive(Remove(client, 0, keys(rng.randrange(30))))
        for tenant in drive.core.tenants():
            assert tenant.used <= tenant.quota
        if rng.random() < 0.02:
            drive(ClientGone(client))
            claims[client].clear()
            drive(ClientTenant(client, {ALICE: "alice", BOB: "bob"}.get(client, "")))


# ---------------------------------------------------------------- the directory


def test_each_node_is_told_what_the_others_have_and_only_when_it_changes() -> None:
    core = DirectoryCore(DirectoryConfig(settle_ns=0), 0)

    def tick() -> list[Elsewhere]:
        told: list[Elsewhere] = []
        while (now := core.deadline()) is not None:
            told += [each for each in core.handle(Tick(), now) if isinstance(each, Elsewhere)]
        return told

    for peer in (1, 2, 3):
        assert core.handle(Registered(peer, NodeInfo(f"n{peer}", 1, (), 1, "")), 0) == [Snapshot(peer)]
    core.handle(Uses(1, {"alice": 5}), 0)
    core.handle(Uses(2, {"alice": 2, "bob": 1}), 0)
    assert tick() == [
        Elsewhere(1, {"alice": 2, "bob": 1}),
        Elsewhere(2, {"alice": 5}),
        Elsewhere(3, {"alice": 7, "bob": 1}),
    ]
    core.handle(Uses(1, {"alice": 5}), 10)
    assert tick() == []
    core.handle(Gone(2), 20)
    assert tick() == [Elsewhere(1, {}), Elsewhere(3, {"alice": 5})]
    assert core.usage() == {"alice": 5}
    core.handle(Uses(99, {"alice": 5}), 30)
    assert core.deadline() is None, "a stranger"


# ---------------------------------------------------------------- real nodes


def test_a_quota_is_of_all_nodes_together() -> None:
    async def main() -> None:
        async with cluster() as nodes:
            for name in ("a", "b"):
                await nodes.start(name, quotas={"alice": 420_000})
            await nodes.known(2)
            ask = asyncio.to_thread

            def client(home: str, tenant: str) -> Store:
                address = nodes.nodes[home].addresses[1]
                directory, cluster_name = nodes.server.addresses, nodes.server.cluster
                return Store.connect([address], directory=directory, cluster=cluster_name, token=TOKEN, tenant=tenant)

            a, b, other = [await ask(client, *of) for of in (("a", "alice"), ("b", "alice"), ("b", "bob"))]
            data = b"1" * 100_000
            assert [await ask(a.put, key(number), data) for number in range(3)] == [PutResult.STORED] * 3
            await eventually(lambda: nodes.nodes["b"].core.tenants()[0].elsewhere >= 300_000)
            assert await ask(b.put, key(10), data) is PutResult.STORED
            assert await ask(b.put, key(11), data) is PutResult.STORED
            assert not await ask(b.exists, key(10)), "there was room for one more of Alice's on all nodes"
            assert await ask(a.exists_batch, keys(0, 1, 2)) == [True] * 3
            assert [await ask(other.put, key(number), data) for number in range(20, 26)] == [PutResult.STORED] * 6
            for store in (a, b, other):
                await ask(store.close)

    run(main())


def test_a_node_that_is_killed_and_adopts_its_memory_knows_whose_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        config = node_config(quotas={"alice": 300_000}, shm_dir=str(tmp_path), unix_path=str(tmp_path / "s"))
        first = StoreNode(config, lambda report: None)
        await first.start()
        store = await asyncio.to_thread(lambda: Store.connect(first.addresses[:1], token=TOKEN, tenant="alice"))
        assert await asyncio.to_thread(store.put, key(1), b"1" * 20_000) is PutResult.STORED
        [alice] = first.core.tenants()
        assert alice.used >= 20_000
        die(first)
        os.unlink(config.unix_path)
        second = StoreNode(config, lambda report: None)
        await second.start()
        [alice] = second.core.tenants()
        assert alice.used == -(-20_000 // UNIT) * UNIT, "what was only granted is gone"
        store.close()
        await second.close()

    run(main())


# ---------------------------------------------------------------- configuration


def test_quotas_are_read_from_one_option_and_errors_name_it() -> None:
    assert parse_quotas("alice=10GiB, b=c=5k") == {"alice": 10 << 30, "b=c": 5000}
    assert parse_quotas("") == {}
    assert format_quotas({}) == "" and parse_quotas(format_quotas({"a": 1, "b": 2})) == {"a": 1, "b": 2}
    for text in ("alice", "alice=", "=5", "alice=0", "alice=x", "a=1,a=2", "alice=-1"):
        with pytest.raises(ConfigError, match="store_quotas"):
            load_config(None, {"store_quotas": text}, {})
