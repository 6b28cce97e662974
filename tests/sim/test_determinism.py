"""A run is a pure function of configuration and seed: byte-identical event logs, whatever the process."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import hashlib
from mooncake.core.event_log import encode_commands
from mooncake.core.types import NANOS_PER_S
from mooncake.sim.cluster import SimCluster
from mooncake.sim.faults import FaultRates, draw_faults, schedule
from tests.sim.workload import FAULTY, requests
import random
digest = hashlib.blake2b()
count = 0
def watch(now, name, core, event, commands):
    global count
    count += 1
    digest.update(f"{now} {name} {event!r}".encode() + encode_commands(commands))
cluster = SimCluster(FAULTY, 3, watch)
rng = random.Random(3)
cluster.submit(requests(rng, 100, 2 * NANOS_PER_S))
schedule(cluster, draw_faults(rng, cluster.names, 2 * NANOS_PER_S, FaultRates()))
cluster.run(2000 * NANOS_PER_S)
print(count, digest.hexdigest())
"""


def test_two_processes_with_other_hash_seeds_write_the_same_log() -> None:
    logs = []
    for hash_seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        logs.append(done.stdout)
    assert logs[0] == logs[1]
    assert int(logs[0].split()[0]) > 2000
