"""`mooncake serve` with small stand-ins for the role processes; run by test_local with a run folder and a behaviour."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from mooncake import cli
from mooncake.cluster import local
from mooncake.config import Config, RoleConfig

CHILD = """
import sys, time, signal
from mooncake.cluster.child import start_child
from mooncake.config import read_launch
status = start_child(read_launch(), "info")
name, behaviour, folder = sys.argv[1:]
def stop(number, frame):
    print("stopped", name, time.monotonic_ns(), file=open(folder + "/stops", "a"), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else stop)
open(f"{folder}/{name}.sock", "w").close()
status.loading("things")
if behaviour == "bad":
    status.failed(f"{name}: weights = 'x': no good")
    sys.exit(2)
status.ready()
time.sleep(60)
"""


def child_spec(config: Config, file: Path, role: RoleConfig) -> local.ChildSpec:
    behaviour = BEHAVIOURS.get(role.name, "good")
    spec = _real_child_spec(config, file, role)
    return msgspec.structs.replace(spec, argv=(sys.executable, "-c", CHILD, role.name, behaviour, config.run_dir))


async def prepare(*_: object) -> bool:
    return True


BEHAVIOURS = dict(pair.split("=") for pair in sys.argv[1].split(",") if pair)
_real_child_spec = local.child_spec
local.child_spec = child_spec
local._prepare = prepare

if __name__ == "__main__":
    sys.exit(cli.main(["serve", *sys.argv[2:]]))
