"""Nodes, clients and directories of a store that die or stop, as real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mooncake.core.errors import DeadlineExceeded, StoreUnavailable
from mooncake.store.api import Absent, PutResult, Store
from tests.live.harness import ROOT, clean_environment
from tests.live.stores import DEADLINE_S, TOKEN, Stores, until

SIZE = 20_000


def key(number: int) -> bytes:
    return number.to_bytes(24, "big")


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.monotonic()
    return call(*arguments), time.monotonic() - began


@pytest.fixture
def stores() -> Iterator[Stores]:
    with Stores() as made:
        made.start_directory()
        yield made


def put_all(store: Store, numbers: range, replicas: int = 1) -> list[bytes]:
    names = [key(number) for number in numbers]
    assert set(store.put_batch(names, [content(number) for number in numbers], replicas=replicas)) == {PutResult.STORED}
    return names


def test_what_a_killed_node_held_alone_is_a_miss_within_a_second(stores: Stores) -> None:
    stores.start("a", remote=False)
    stores.start("b")
    with stores.client("a") as a:
        names = put_all(a, range(20))
    os.unlink(stores.folder / "a" / "a.sock")
    with stores.client("b") as b:
        assert b.get_batch(names) == [content(number) for number in range(20)]
        until(lambda: b.get(key(99)) is Absent.MISS)  # the directory has heard of all
        stores.kill("a")
        killed = time.monotonic()
        while True:
            found, seconds = timed(b.get, names[0])
            assert seconds < DEADLINE_S
            if found is Absent.MISS:
                break
            assert found == content(0) and time.monotonic() - killed < 1
        assert time.monotonic() - killed < 1
        assert b.get_batch(names) == [Absent.MISS] * 20


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_with_two_replicas_every_read_succeeds_at_once_and_the_second_comes_back(stores: Stores, how: str) -> None:
    for name in ("a", "b", "c", "d"):
        stores.start(name)
    with stores.client("a") as a:
        names = put_all(a, range(30), replicas=2)
        assert a.replicate(names, 2) == [2] * 30
    for name in ("a", "b", "c"):
        os.unlink(stores.folder / name / f"{name}.sock")
    with stores.client("d") as d:
        assert d.get_batch(names) == [content(number) for number in range(30)]
        if how == "killed":
            stores.kill("a")
        else:
            stores.stop("a")
        for number, name in enumerate(names):
            found, seconds = timed(d.get, name)
            assert found == content(number) and seconds < (0.2 if how == "killed" else 0.5), (number, seconds)
        if how == "killed":
            assert d.replicate(names, 2) == [2] * 30
        else:
            stores.go_on("a")
            assert d.get_batch(names) == [content(number) for number in range(30)]


def test_a_stopped_owner_does_not_stop_readers_and_is_right_afterwards(stores: Stores) -> None:
    stores.start("a")
    stores.start("b")
    with stores.client("a") as a, stores.client("b") as b:
        names = put_all(a, range(20))
        assert b.get(names[0]) == content(0)
        stores.stop("a")
        found, seconds = timed(a.get_batch, names)
        assert found == [content(number) for number in range(20)] and seconds < 0.5, "same machine: it is still valid"
        os.unlink(stores.folder / "a" / "a.sock")
        with stores.client("b") as other:
            for name in names[:3]:
                found, seconds = timed(other.get, name)
                assert found is Absent.MISS and seconds < 0.5, seconds
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, StoreUnavailable)):
            a.put(key(100), content(100))
        assert time.monotonic() - began < DEADLINE_S + 1
        stores.go_on("a")
        until(lambda: a.put(key(101), content(101)) is PutResult.STORED)
        assert a.get_batch(names) == [content(number) for number in range(20)]


def test_a_directory_that_is_killed_finds_100_000_objects_again(stores: Stores) -> None:
    stores.memory = "64MiB"
    stores.start("a")
    stores.start("b")
    numbers = range(100_000)
    with stores.client("a") as a:
        for first in numbers[::10_000]:
            part = [key(number) for number in range(first, first + 10_000)]
            assert set(a.put_batch(part, [number[-4:] for number in part])) <= {PutResult.STORED}
    with stores.client("b") as b:
        count = sum(
            b.exists_batch([key(number) for number in range(first, first + 10_000)]).count(True)
            for first in numbers[::10_000]
        )
        assert count >= 10_000  # as many as have room, a page of memory each
        stores.kill("directory")
        stores.start_directory()
        began = time.monotonic()
        until(
            lambda: (
                sum(
                    b.exists_batch([key(number) for number in range(first, first + 10_000)]).count(True)
                    for first in numbers[::10_000]
                )
                == count
            ),
            5.0,
        )
        assert time.monotonic() - began < 5


def test_a_node_whose_process_died_has_its_memory_back(stores: Stores) -> None:
    stores.start("a")
    with stores.client("a") as a:
        names = put_all(a, range(50))
        with a.leased(names[:1]) as mine:
            stores.kill("a")
            began = time.monotonic()
            stores.start("a")
            assert mine.view(0) == content(0), "leased from the first life"
            until(lambda: a.get_batch(names) == [content(number) for number in range(50)])
            assert time.monotonic() - began < 10
            until(lambda: a.put(key(99), content(99)) is PutResult.STORED)
            assert len(a.locate(names[:1])[0]) == 1


_WRITER = """
import os, sys
from mooncake.store.api import Store
from mooncake.core.keys import OBJECT_KEY_BYTES
store = Store.connect([sys.argv[1]], token=sys.argv[2])
with store.writing((7).to_bytes(OBJECT_KEY_BYTES, "big"), 1 << 20) as session:
    session.write(0, bytes(1 << 19))
    print("half", flush=True)
    sys.stdin.read()
"""


def test_a_writer_killed_in_the_middle_leaves_nothing_and_its_key_is_free(stores: Stores) -> None:
    stores.start("a")
    with stores.client("a") as a:
        address = f"unix:{stores.folder / 'a' / 'a'}.sock"
        writer = _python(_WRITER, address)
        assert writer.stdout is not None and writer.stdout.readline() == b"half\n"
        assert a.get(key(7)) is Absent.MISS or a.get(key(7)) is Absent.UNKNOWN
        writer.kill()
        writer.communicate()
        began = time.monotonic()
        assert a.put(key(7), b"another", strict=False) is PutResult.STORED
        assert a.get(key(7)) == b"another" and time.monotonic() - began < 1
        until(lambda: a.put(key(8), bytes(60 << 20)) in (PutResult.STORED, PutResult.EXISTS), 2.0)  # its room too


_READER = """
import random, sys
from mooncake.store.api import Absent, Store
store, rng = Store.connect([sys.argv[1]], token=sys.argv[2]), random.Random(int(sys.argv[3]))
print("reading", flush=True)
wrong = reads = 0
while True:
    number = rng.randrange(400)
    expected = random.Random(number).randbytes(20_000)
    if rng.random() < 0.5:
        found = store.get(number.to_bytes(24, "big"))
        reads += found is not Absent.MISS
        ok = found is Absent.MISS or found == expected
    else:
        with store.view(number.to_bytes(24, "big")) as view:
            ok = not view or (view == expected and view[:100] == expected[:100])
            reads += bool(view)
    if not ok:
        print("WRONG", number, flush=True)
        break
    if reads % 50 == 0:
        print("reads", reads, flush=True)
"""


def test_readers_killed_at_random_points_under_full_eviction_read_right_and_leak_nothing() -> None:
    rng = random.Random(11)
    with Stores("2MiB") as stores:  # a quarter of what is put
        stores.start_directory()
        stores.start("a")
        address = f"unix:{stores.folder / 'a' / 'a'}.sock"
        with Store.connect([address], token=TOKEN) as writer:
            readers: list[subprocess.Popen[bytes]] = []
            outputs: list[bytes] = []
            end = time.monotonic() + 12
            spawned = 0
            contents = [content(number) for number in range(400)]
            while time.monotonic() < end:
                while len(readers) < 2:
                    readers.append(_python(_READER, address, str(spawned)))
                    spawned += 1
                kill_at = time.monotonic() + rng.uniform(0.8, 2.0)
                while time.monotonic() < kill_at:
                    numbers = rng.sample(range(400), 8)
                    writer.put_batch([key(number) for number in numbers], [contents[number] for number in numbers])
                victim = readers.pop(rng.randrange(len(readers)))
                victim.send_signal(signal.SIGKILL)
                outputs.append(victim.communicate()[0])
            for reader in readers:
                reader.kill()
                outputs.append(reader.communicate()[0])
            assert not any(b"WRONG" in output for output in outputs)
            assert sum(output.count(b"reads") for output in outputs) > 10, outputs
        # No claim is left, and no grant: everything can be evicted for one object as large as the store.
        with Store.connect([address], token=TOKEN) as last:
            until(lambda: last.put(key(10_000), bytes(2 << 20)) is PutResult.STORED, 5.0)


_CLIENT = """
import random, sys, time
from mooncake.core.errors import StoreError
from mooncake.store.api import Store
from tests.live.test_store_faults import made, torn
run_dir, token, seed, directory, cluster = sys.argv[1:]
rng, seed = random.Random(int(seed)), int(seed)
store = Store.connect([run_dir], directory=[directory], cluster=cluster, token=token, deadline_s=2.0)
operations = 0
print("begun", flush=True)
while True:
    numbers = rng.sample(range(300), 4)
    names = [number.to_bytes(24, "big") for number in numbers]
    try:
        choice = rng.random()
        if choice < 0.35:
            replicas = 1 + (rng.random() < 0.1)
            store.put_batch(names, [made(number, seed, operations) for number in numbers], replicas=replicas)
        elif choice < 0.9:
            wrong = [number for number, found in zip(numbers, store.get_batch(names)) if found and torn(number, found)]
            if wrong:
                print("WRONG", wrong, flush=True)
                break
        elif choice < 0.97:
            with store.view(names[0]) as view:
                if view and torn(numbers[0], bytes(view)):
                    print("WRONG", numbers[:1], flush=True)
                    break
        else:
            store.remove_batch(names[:1])
    except StoreError as error:
        print("error", type(error).__name__, flush=True)
        time.sleep(0.02)
    operations += 4
    if operations % 400 == 0:
        print("operations", operations, flush=True)
"""


def made(number: int, writer: int, turn: int) -> bytes:
    """Contents that say whose they are, and are all of one piece."""
    return b"".join((number.to_bytes(8, "big"), (writer << 32 | turn).to_bytes(8, "big"))) * (50 + number * 3)


def torn(number: int, data: bytes) -> bool:
    return data[:8] != number.to_bytes(8, "big") or data != data[:16] * (50 + number * 3)


def test_a_history_of_many_clients_with_kills_reads_only_what_was_committed() -> None:
    rng = random.Random(23)
    with Stores("1MiB") as stores:
        stores.start_directory()
        for name in ("a", "b", "c"):
            stores.start(name)
        os.unlink(stores.folder / "c" / "c.sock")  # c is another machine for a and b, and its clients have a home at b

        def client(number: int) -> subprocess.Popen[bytes]:
            home = "ab"[number % 2]
            address = f"unix:{stores.folder / home / home}.sock"
            return _python(_CLIENT, address, str(number), stores.directory[0], stores.cluster)

        clients = [client(number) for number in range(3)]
        outputs: list[bytes] = []
        for turn in range(10):
            time.sleep(rng.uniform(1.0, 2.5))
            at = rng.randrange(3)
            clients[at].kill()
            outputs.append(clients[at].communicate()[0])
            clients[at] = client(3 + turn)
            if turn in (3, 6):
                name = "ac"[turn == 6]
                stores.kill(name)
                stores.start(name)
            if turn == 8:
                stores.kill("directory")
                stores.start_directory()
        for each in clients:
            each.kill()
            outputs.append(each.communicate()[0])
        assert not [output for output in outputs if b"WRONG" in output]
        counts = [
            [int(line.split()[1]) for line in output.splitlines() if line.startswith(b"operations")]
            for output in outputs
        ]
        assert sum(max(count, default=0) for count in counts) > 10_000, outputs
        with stores.client("a") as a:
            until(lambda: a.put(key(10_000), bytes(1 << 20)) in (PutResult.STORED, PutResult.EXISTS))  # nothing is held


def _python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, arguments[0], TOKEN, *arguments[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(),
        cwd=ROOT,
    )
