"""Makes mooncake/rpc/generated from mooncake/rpc/proto: `python -m mooncake.rpc.generate`. Needs grpcio-tools 1.73.

Generated code runs with the protobuf that made it and newer ones, one major version up included. So it is made by the
oldest that pyproject.toml allows, else a clean install with that one would not import.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path

ROOM = Path(__file__).parent
OLDEST_PROTOBUF = (6, 31)
"""The lower bound of protobuf in pyproject.toml."""


def generate(out: Path) -> None:
    """Raises RuntimeError if the compiler finds a fault."""
    protoc = import_module("grpc_tools.protoc")
    proto = ROOM / "proto"
    files = [str(path) for path in sorted(proto.glob("*.proto"))]
    if protoc.main(["protoc", f"-I{proto}", f"--python_out={out}", f"--pyi_out={out}", *files]):
        raise RuntimeError("protoc failed")


def needed_protobuf(code: str) -> tuple[int, int]:
    """The oldest protobuf that generated code runs with."""
    found = re.search(r"^# Protobuf Python Version: (\d+)\.(\d+)", code, re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


def main() -> str | None:
    """Why nothing was changed, or None."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        files = {path.name: path.read_text() for path in Path(folder).iterdir()}
    needed = max(needed_protobuf(code) for name, code in files.items() if name.endswith(".py"))
    if needed > OLDEST_PROTOBUF:
        return f"this compiler's code needs protobuf {needed[0]}.{needed[1]}; take grpcio-tools==1.73.*"
    for name, code in files.items():
        (ROOM / "generated" / name).write_text(code)
    return None


if __name__ == "__main__":
    sys.exit(main())
