"""Makes mooncake/rpc/generated from mooncake/rpc/proto: `python -m mooncake.rpc.generate`. Needs grpcio-tools."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOM = Path(__file__).parent


def generate(out: Path) -> None:
    """Raises RuntimeError if the compiler finds a fault."""
    protoc = import_module("grpc_tools.protoc")
    proto = ROOM / "proto"
    files = [str(path) for path in sorted(proto.glob("*.proto"))]
    if protoc.main(["protoc", f"-I{proto}", f"--python_out={out}", f"--pyi_out={out}", *files]):
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate(ROOM / "generated")
    sys.exit(0)
