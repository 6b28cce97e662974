"""The store's own speed, beside a copy and a raw socket in the same run.

Two processes: this one, with one thread, and a node, which it starts. memcpy copies objects of the same size between distinct
buffers, through 1 GiB; the raw socket is a stream between two processes that sends straight from memory and receives straight
into it. Each figure is the median of rounds in which the system and its baseline take turns; the spread is printed. Checksums
are on. Segments are populated before. Run it on quiet cores.

--system NAME: another store under the same loops, a module with a class `System` of the same methods as `Mooncake` here.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import mmap
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, emit, finish, spread

from mooncake.core.types import Tier
from mooncake.store.api import PutResult, Store
from mooncake.store.directory.holders import Holder, Holders
from mooncake.transport.shm import cleanup_stale
from mooncake.transport.sockets import receive

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PUT_GET = ("put", "get")
ROUNDS = 9
BYTES_OF_A_ROUND = 256 * MIB
NODE_BYTES = 2 * GIB
TOKEN = "benchmark"


class Mooncake:
    """A node process; `local` reaches it as a client on its machine does, `remote` as one elsewhere."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mooncake-bench-"))
        self._cluster = f"bench-{os.getpid()}"
        environ = {**os.environ, "MOONCAKE_TOKEN": TOKEN}
        options = ("--cluster", self._cluster, "--store-memory", str(NODE_BYTES), "--run-dir", str(self._folder))
        nowhere = f"unix:{self._folder}/no-directory"
        argv = [sys.executable, "-m", "mooncake", "store", "--name", "n0", "--listen", "tcp://127.0.0.1:0", *options]
        self._log = self._folder / "log"
        with self._log.open("wb") as log:
            self._node = subprocess.Popen(
                [*argv, "--directory", nowhere], stdout=log, stderr=log, env=environ, cwd=ROOT
            )
        while " ready" not in self._log.read_text():
            assert self._node.poll() is None, self._log.read_text()
            time.sleep(0.05)
        unix = f"unix:{self._folder}/n0.sock"
        self.local = Store.connect([unix], token=TOKEN)
        [tcp] = [line.split()[-1] for line in self._log.read_text().splitlines() if "tcp://" in line][-1:]
        self.remote = Store.connect([tcp], token=TOKEN)

    def put(self, store: Store, keys: Sequence[bytes], data: Sequence[Any]) -> None:
        results = store.put_batch(keys, data)
        assert set(results) == {PutResult.STORED}, results

    def get(self, store: Store, keys: Sequence[bytes], buffers: Sequence[Any]) -> None:
        assert store.get_into_batch(keys, buffers) == [len(each) for each in buffers]

    def view(self, store: Store, key: bytes) -> int:
        with store.view(key) as view:
            assert isinstance(view, memoryview)
            return view[0]

    def exists(self, store: Store) -> Callable[[bytes], bool]:
        return store.exists

    def exists_batch(self, store: Store, keys: Sequence[bytes]) -> bool:
        return all(store.exists_batch(keys))

    def cpu_s(self) -> float:
        """Of the node's process so far."""
        fields = Path(f"/proc/{self._node.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.local.close()
        self.remote.close()
        self._node.send_signal(signal.SIGTERM)
        self._node.wait(20)
        cleanup_stale(self._cluster)
        shutil.rmtree(self._folder, ignore_errors=True)


class Buffers:
    """Distinct memory to put from, to get into and to copy to; page-aligned, and every page of it was touched."""

    def __init__(self) -> None:
        self.source = np.frombuffer(mmap.mmap(-1, GIB), np.uint8)
        self.source[:] = np.random.default_rng(1).integers(0, 255, GIB, np.uint8)
        self.target = np.frombuffer(mmap.mmap(-1, GIB), np.uint8)
        self.target[:] = 1
        self._at = 0

    def batches(self, size: int, batch: int, total: int) -> list[list[slice]]:
        """Slices that go on through the memory from call to call."""
        made = []
        for _ in range(max(1, total // (size * batch))):
            parts = []
            for _ in range(batch):
                if self._at + size > GIB:
                    self._at = 0
                parts.append(slice(self._at, self._at + size))
                self._at += size
            made.append(parts)
        return made


def names(count: int) -> list[bytes]:
    return [os.urandom(24) for _ in range(count)]


def repeat(call: Callable[[Any, Any, Any], None], store: Any, keys: list[Any], data: list[Any]) -> None:
    for some, parts in zip(keys, data, strict=True):
        call(store, some, parts)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_puts_and_gets(
    buffers: Buffers, system: Any, store: Any, size: int, batch: int, baseline: Callable[[int, int], float], rounds: int
) -> dict[str, list[float]]:
    """Bytes per second of the system and its baseline (baseline(size, total) gives seconds), and the ratios of each round."""
    total = min(BYTES_OF_A_ROUND, 8192 * size)
    found: dict[str, list[float]] = {name: [] for name in ("put", "get", "baseline", "put_ratio", "get_ratio")}
    for at in range(rounds + 1):
        parts = buffers.batches(size, batch, total)
        keys = [names(batch) for _ in parts]
        moved = len(parts) * batch * size
        sources = [[buffers.source[each] for each in where] for where in parts]
        targets = [[buffers.target[each] for each in where] for where in parts]
        before = baseline(size, moved)
        put_s = timed(partial(repeat, system.put, store, keys, sources))
        get_s = timed(partial(repeat, system.get, store, keys, targets))
        after = baseline(size, moved)
        last = parts[-1][-1]
        assert np.array_equal(buffers.source[last], buffers.target[last])
        if at:  # the first is a warm-up
            base = moved * 2 / (before + after)
            for name, value in (("put", moved / put_s), ("get", moved / get_s), ("baseline", base)):
                found[name].append(value)
            found["put_ratio"].append(found["put"][-1] / base)
            found["get_ratio"].append(found["get"][-1] / base)
    for name, values in found.items():
        scale = 1 if name.endswith("ratio") else 1e-9
        emit(size=size, batch=batch, what=name, **spread([value * scale for value in values]))
    return found


def memcpy(buffers: Buffers, size: int, total: int) -> float:
    """Seconds to copy so many bytes, object by object."""
    parts = [part for batch in buffers.batches(size, 1, total) for part in batch]
    began = time.perf_counter()
    for part in parts:
        np.copyto(buffers.target[part], buffers.source[part])
    return time.perf_counter() - began


class RawSocket:
    """A peer that receives into memory of its own, told how much; both ends do nothing else."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as door:
            argv = [sys.executable, __file__, "--raw-peer", str(door.getsockname()[1])]
            self._peer = subprocess.Popen(argv, cwd=ROOT)
            self._stream, _ = door.accept()
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._stream.close()
        self._peer.wait(10)

    def __call__(self, buffers: Buffers, size: int, total: int) -> float:
        parts = [part for batch in buffers.batches(size, 1, total) for part in batch]
        began = time.perf_counter()
        self._stream.sendall(size.to_bytes(8, "little") + len(parts).to_bytes(8, "little"))
        for part in parts:
            self._stream.sendall(buffers.source[part])
        receive(self._stream, [memoryview(bytearray(1))])
        return time.perf_counter() - began

    @staticmethod
    def receive(port: int) -> None:
        """The peer's whole life."""
        stream = socket.create_connection(("127.0.0.1", port))
        memory = memoryview(np.ones(BYTES_OF_A_ROUND, np.uint8))
        head = bytearray(16)
        while stream.recv_into(head, 16, socket.MSG_WAITALL) == 16:
            size, count = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
            at = 0
            for _ in range(count):
                at = at if at + size <= memory.nbytes else 0
                receive(stream, [memory[at : at + size]])
                at += size
            stream.sendall(b"1")


def rate(call: Callable[[], int], rounds: int) -> float:
    """Things per second, median: `call` gives how many it did."""
    rates = []
    for at in range(rounds + 1):
        began = time.perf_counter()
        count = call()
        if at:
            rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def measure_small_calls(buffers: Buffers, system: Any, rounds: int) -> dict[str, float]:
    big = names(1)
    system.put(system.local, big, [buffers.source[: 64 * MIB]])
    views = [timed(lambda: system.view(system.local, big[0])) for _ in range(2000)]
    keys = names(4096)
    for first in range(0, len(keys), 128):
        system.put(system.local, keys[first : first + 128], [buffers.source[:4096]] * 128)

    def one_by_one() -> int:
        exists = system.exists(system.local)
        for key in keys:
            exists(key)
        return len(keys)

    def by_128() -> int:
        for first in range(0, len(keys), 128):
            assert system.exists_batch(system.remote, keys[first : first + 128])
        return len(keys)

    return {
        "view_us_64m": statistics.median(views) * 1e6,
        "exists_per_s": rate(one_by_one, 5 * rounds),
        "exists_b128_keys_per_s": rate(by_128, 5 * rounds),
    }


def measure_tcp(buffers: Buffers, system: Any, rounds: int) -> dict[str, float]:
    raw = RawSocket()
    found = measure_puts_and_gets(buffers, system, system.remote, MIB, 16, partial(raw, buffers), rounds)
    raw.close()
    cpu = time.process_time() + system.cpu_s()
    measure_puts_and_gets(buffers, system, system.remote, 16 * MIB, 1, lambda size, total: 1.0, rounds)
    num_bytes = (rounds + 1) * 2 * BYTES_OF_A_ROUND
    cpu_s_per_gb = (time.process_time() + system.cpu_s() - cpu) / (num_bytes / 1e9)
    return {
        "tcp_put_1m_vs_raw": statistics.median(found["put_ratio"]),
        "tcp_get_1m_vs_raw": statistics.median(found["get_ratio"]),
        "tcp_cpu_s_per_gb_16m": cpu_s_per_gb,
    }


def measure_directory() -> dict[str, float]:
    """Memory of a million keys held by two nodes, at its highest while they come; and how fast they come."""
    rss = _rss()
    holders, node, peak, seconds = Holders(), Holder(0, Tier.DRAM), 0, 0.0
    gc.collect()
    for _ in range(1000):
        raw = os.urandom(24 * 1000)
        keys = [raw[at : at + 24] for at in range(0, len(raw), 24)]
        seconds += timed(lambda keys=keys: holders.add(node, keys))
        peak = max(peak, _rss())
    return {"directory_bytes_per_object": (peak - rss) / 1e6, "directory_updates_per_s": 1e6 / seconds}


def figures_of(script: str) -> dict[str, float]:
    """Of another benchmark of the store, which runs alone."""
    path = Path(__file__).with_name(script)
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    for line in lines[:-1]:
        emit(**json.loads(line))
    figures: dict[str, float] = json.loads(lines[-1])["figures"]
    return figures


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="", help="a module with a class System")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--raw-peer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.raw_peer:
        RawSocket.receive(options.raw_peer)
        return
    rounds = options.rounds
    figures = {} if options.system else measure_directory()
    buffers = Buffers()
    system = importlib.import_module(options.system).System() if options.system else Mooncake()
    copy = partial(memcpy, buffers)
    try:
        for size, batch, label in ((MIB, 16, "1m_b16"), (16 * MIB, 1, "16m")):
            found = measure_puts_and_gets(buffers, system, system.local, size, batch, copy, rounds)
            figures |= {f"{what}_{label}_vs_memcpy": statistics.median(found[f"{what}_ratio"]) for what in PUT_GET}
        found = measure_puts_and_gets(buffers, system, system.local, 64 * KIB, 16, copy, rounds)
        figures |= {f"{what}_64k_b16_gbps": statistics.median(found[what]) / 1e9 for what in PUT_GET}
        found = measure_puts_and_gets(buffers, system, system.local, 4 * KIB, 32, copy, rounds)
        figures |= {f"{what}_4k_b32_per_s": statistics.median(found[what]) / 4096 for what in PUT_GET}
        figures |= measure_small_calls(buffers, system, rounds)
        figures |= measure_tcp(buffers, system, rounds)
    finally:
        system.close()
    if not options.system:
        figures |= figures_of("ssd.py") | figures_of("hit_rates.py")
    finish("store", figures)


if __name__ == "__main__":
    main()
