"""The SSD tier of a store node beside the disk itself: direct I/O of 4 MiB pieces on the same file system, in the same run.

    python benchmarks/ssd.py [--dir FOLDER] [--rounds N] [--quick]

ssd_write_vs_direct   1 GiB of committed objects written behind, from their release until all are on SSD, checksums taken
ssd_read_vs_direct    after kill -9 and a new start: one lease of all of them, read and compared with their checksums
ssd_lost_objects      of those that were on SSD when the node was killed, how many did not come back byte for byte
ssd_recover_s         the scan at that start
ssd_write_cpu_s_per_gb, ssd_read_cpu_s_per_gb   processor time of the node and its client meanwhile

Both write to space that was written before, and tell the disk to keep it every 256 MiB. Each round measures disk and tier in
turn; the ratios are of medians, and the first round, which warms up, does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, emit, finish, spread

from mooncake.store.client import StoreClient
from mooncake.store.node import NodeConfig, StoreNode
from mooncake.store.ssd import SsdConfig
from mooncake.transport.shm import cleanup_stale

SIZE = 128 * 23_040
"""A block of the default model."""
PIECE = 4 << 20
SYNC_BYTES = 256 << 20
BATCH = 64


class Setting:
    """num_objects: 1 GiB of them."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder = folder
        self.num_bytes = (1 << 28) if quick else (1 << 30)
        self.num_objects = self.num_bytes // SIZE + 1
        memory = (self.num_objects + 8) * -(-SIZE // 4096) * 4096
        self.config = NodeConfig(
            cluster=f"bench-{folder.name}",
            node="n0",
            capacity_bytes=memory,
            token="bench",
            unix_path=str(folder / "n0.sock"),
            ssd=SsdConfig(self.num_bytes * 5 // 4, ready_bytes=memory, load_wait_ns=60_000_000_000),
            ssd_dir=str(folder),
        )


def key(seed: int, number: int) -> bytes:
    return seed.to_bytes(8, "big") + number.to_bytes(16, "big")


def contents(seed: int, number: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng((seed, number)).bytes(SIZE), np.uint8)


# ---------------------------------------------------------------- the disk


class Disk:
    """Raw direct I/O from and into memory of the kind that a segment is."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.fd = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.fd, 0, num_bytes)
        path = f"/dev/shm/{folder.name}-raw"
        shared = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
        os.ftruncate(shared, num_bytes)
        self.memory = memoryview(mmap.mmap(shared, num_bytes))
        os.close(shared)
        np.frombuffer(self.memory, np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 63, num_bytes // 8)

    def write(self) -> float:
        began = time.perf_counter()
        for at in range(0, self.num_bytes, PIECE):
            os.pwritev(self.fd, [self.memory[at : at + PIECE]], at)
            if (at + PIECE) % SYNC_BYTES == 0:
                os.fdatasync(self.fd)
        return self._rate(began)

    def read(self) -> float:
        began = time.perf_counter()
        for at in range(0, self.num_bytes, PIECE):
            os.preadv(self.fd, [self.memory[at : at + PIECE]], at)
        return self._rate(began)

    def _rate(self, began: float) -> float:
        return self.num_bytes / (time.perf_counter() - began) / 1e9


# ---------------------------------------------------------------- the tier


async def start(setting: Setting) -> tuple[StoreNode, StoreClient]:
    node = StoreNode(setting.config, lambda report: None)
    await node.start()
    return node, await StoreClient.connect([node.addresses[0]], token="bench", name="bench", node="n0")


async def write_all(setting: Setting, seed: int, node: StoreNode, client: StoreClient) -> dict[str, Any]:
    """All objects are in memory and leased; then they are let go. What is less than a job at the end stays unwritten."""
    held = []
    for first in range(0, setting.num_objects, BATCH):
        numbers = range(first, min(first + BATCH, setting.num_objects))
        made = await client.reserve([key(seed, number) for number in numbers], [SIZE] * len(numbers))
        for at, number in enumerate(numbers):
            made.write(at, 0, contents(seed, number))
        await client.commit(made, lease=True)
        held.append(made)
    began, cpu = time.perf_counter(), time.process_time()
    for made in held:
        await client.release(made)
    while node.core.metrics()["ssd_jobs"]:
        await asyncio.sleep(0.001)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert node.core._ssd is not None
    written = [number for number in range(setting.num_objects) if node.core._ssd.has(key(seed, number))]
    num_gb = len(written) * SIZE / 1e9
    return {"rate": num_gb / seconds, "cpu": cpu / num_gb, "written": written}


def write_and_be_killed(setting: Setting, seed: int, quick: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(seed), "--dir", str(setting.folder)]
    with subprocess.Popen(command + ["--quick"] * quick, stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    found: dict[str, Any] = json.loads(line)
    return found


async def read_all(seed: int, numbers: list[int], client: StoreClient) -> dict[str, float]:
    keys = [key(seed, number) for number in numbers]
    began, cpu = time.perf_counter(), time.process_time()
    leased = await client.lease(keys, deadline_s=60)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    num_gb = len(keys) * SIZE / 1e9
    same = [
        leased.locations[at] is not None
        and np.array_equal(np.frombuffer(leased.view(at), np.uint8), contents(seed, number))
        for at, number in enumerate(numbers)
    ]
    await client.release(leased)
    return {"rate": num_gb / seconds, "cpu": cpu / num_gb, "lost": same.count(False)}


async def recover(setting: Setting, seed: int, written: list[int]) -> dict[str, float]:
    node, client = await start(setting)
    try:
        began = time.perf_counter()
        assert node._ssd is not None
        node._ssd.recover()
        recover_s = time.perf_counter() - began
        return await read_all(seed, written, client) | {"recover_s": recover_s}
    finally:
        await client.close()
        await node.close()


# ---------------------------------------------------------------- all of it


async def child(setting: Setting, seed: int) -> None:
    """Tells what it measured, and waits to be killed."""
    node, client = await start(setting)
    print(json.dumps(await write_all(setting, seed, node, client)), flush=True)
    await asyncio.sleep(600)


def run_round(setting: Setting, disk: Disk, seed: int, quick: bool) -> dict[str, float]:
    direct_write = disk.write()
    written = write_and_be_killed(setting, seed, quick)
    direct_read = disk.read()
    cleanup_stale(setting.config.cluster)  # as if the machine had gone too: else the node has its memory back
    (setting.folder / "n0.sock").unlink()
    read = asyncio.run(recover(setting, seed, written["written"]))
    return {
        "direct_write": direct_write,
        "write": written["rate"],
        "write_cpu": written["cpu"],
        "direct_read": direct_read,
        "read": read["rate"],
        "read_cpu": read["cpu"],
        "lost": read["lost"],
        "recover_s": read["recover_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="256 MiB, two rounds")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        asyncio.run(child(Setting(options.dir, options.quick), options.child))
        return
    folder = Path(tempfile.mkdtemp(prefix="mooncake-ssd-", dir=options.dir))
    try:
        setting = Setting(folder, options.quick)
        disk = Disk(folder, setting.num_bytes)
        num_rounds = 2 if options.quick else options.rounds
        rounds = [run_round(setting, disk, seed, options.quick) for seed in range(num_rounds + 1)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    columns = {name: [each[name] for each in rounds[1:]] for name in rounds[0]}
    for name, unit in (("direct_write", "GB/s"), ("write", "GB/s"), ("direct_read", "GB/s"), ("read", "GB/s")):
        emit(figure=f"ssd_{name}", unit=unit, **spread(columns[name]))
    medians = {name: statistics.median(values) for name, values in columns.items()}
    figures = {
        "ssd_write_vs_direct": medians["write"] / medians["direct_write"],
        "ssd_read_vs_direct": medians["read"] / medians["direct_read"],
        "ssd_lost_objects": sum(each["lost"] for each in rounds),
        "ssd_recover_s": medians["recover_s"],
        "ssd_write_cpu_s_per_gb": medians["write_cpu"],
        "ssd_read_cpu_s_per_gb": medians["read_cpu"],
    }
    finish("ssd", figures)


if __name__ == "__main__":
    main()
