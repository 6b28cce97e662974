"""Small jobs and instances for the tests of the cores: blocks of eight tokens."""

from typing import Any

from mooncake.core.types import AttemptKey, InstanceInfo, Job, KvSource, Role, SamplingParams
from mooncake.engine.attempts import EngineProgress
from mooncake.engine.core import EngineLoad

IDLE = EngineLoad(0, 0, 0, 0, 10)
S = 1_000_000_000


def key(number: int, attempt: int = 0, frontend: str = "f0") -> AttemptKey:
    return AttemptKey(frontend, number, 0, attempt)


def blocks(number: int, count: int) -> tuple[bytes, ...]:
    return tuple(bytes([number, index]) * 8 for index in range(count))


def make_job(number: int, num_tokens: int = 20, **more: Any) -> Job:
    fields: dict[str, Any] = {
        "key": key(number),
        "num_tokens": num_tokens,
        "num_prompt_tokens": num_tokens,
        "max_tokens": 10,
        "block_keys": blocks(number, num_tokens // 8),
        "token_ids": b"",
        "sampling": SamplingParams(),
        "deadline_ns": 100 * S,
    }
    return Job(**(fields | more))


def make_source(number: int, num_tokens: int, node: str = "n0") -> KvSource:
    partial = b"p" * 16 if num_tokens % 8 else b""
    return KvSource(node, num_tokens, blocks(number, num_tokens // 8), partial, ("unix:/n0",))


def make_info(role: Role) -> InstanceInfo:
    return InstanceInfo("i0", 1, role, "unix:/i0", "c", "n0", ("unix:/n0",), 10, 4, 4, 16)


def progress(
    *outputs: Any,
    added: tuple[bytes, ...] = (),
    removed: tuple[bytes, ...] = (),
    cached: tuple[bytes, ...] | None = None,
) -> EngineProgress:
    return EngineProgress(outputs, IDLE, 1, added, removed, cached)
