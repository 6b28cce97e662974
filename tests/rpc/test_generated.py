"""The committed code is what the committed protobuf files give, and runs with every protobuf that we allow."""

import re
import tomllib
from pathlib import Path

import pytest

from mooncake.rpc.generate import OLDEST_PROTOBUF, ROOM, generate, needed_protobuf

GENERATED = ROOM / "generated"


def normal(code: str) -> str:
    """Compilers of different versions name themselves, in a comment and in a call, and declare bool arguments differently."""
    code = re.sub(r"(?m)^# Protobuf Python Version: .*\n|^    \d+,\n", "", code)
    return code.replace("_Optional[bool]", "bool")


def test_generating_again_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    generate(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in GENERATED.glob("*_pb2*"))
    for name in names:
        fresh, committed = (normal((folder / name).read_text()) for folder in (tmp_path, GENERATED))
        assert fresh == committed, f"{name} is stale: run python -m mooncake.rpc.generate"


def test_the_code_runs_with_the_oldest_protobuf_that_pyproject_allows() -> None:
    for path in GENERATED.glob("*_pb2.py"):
        assert needed_protobuf(path.read_text()) <= OLDEST_PROTOBUF
    project = tomllib.loads((ROOM.parents[1] / "pyproject.toml").read_text())["project"]
    oldest = "{}.{}".format(*OLDEST_PROTOBUF)
    assert any(need.startswith(f"protobuf>={oldest},") for need in project["dependencies"])
