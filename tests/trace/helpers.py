"""What the tests of traces share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mooncake.trace.types import TraceRequest

TRACES = Path(__file__).parent.parent.parent.parent / "shared" / "traces"


def real_trace(name: str) -> Path:
    """Skips the test where the trace is absent."""
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"the trace {name} is not in {TRACES}")
    return path


def mooncake_line(timestamp: object = 0, input_length: int = 600, output_length: object = 5, **fields: object) -> str:
    """hash_ids: as many as fit, unless given."""
    hash_ids = list(range(-(-input_length // 512)))
    line = {"timestamp": timestamp, "input_length": input_length, "output_length": output_length, "hash_ids": hash_ids}
    return json.dumps({**line, **fields})


def bailian_line(chat_id: object = 1, timestamp: float = 0, **fields: object) -> str:
    """Of 20 tokens."""
    line = {"chat_id": chat_id, "parent_chat_id": -1, "timestamp": timestamp, "input_length": 20, "output_length": 5}
    return json.dumps({**line, "type": "text", "turn": 1, "hash_ids": [7, 8], **fields})


def written(folder: Path, *lines: str, end: str = "\n") -> Path:
    path = folder / "trace"
    path.write_text("".join(line + end for line in lines))
    return path


def requests_of(*prompts: str, tokens_per_block: int = 10) -> list[TraceRequest]:
    """One request per prompt, a second apart; a letter is a block, equal letters only share if what is before them is equal."""
    ids: dict[str, int] = {}
    return [
        TraceRequest(
            number * 1_000_000_000,
            len(prompt) * tokens_per_block,
            1,
            tuple(ids.setdefault(prompt[: end + 1], len(ids)) for end in range(len(prompt))),
        )
        for number, prompt in enumerate(prompts)
    ]
