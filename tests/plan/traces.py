"""Small traces in files."""

from __future__ import annotations

import json
from pathlib import Path


def write_trace(path: Path, count: int = 40, *, step_ms: int = 250, tokens: int = 1500, output: int = 20) -> Path:
    """Prompts of three blocks; the first block is everybody's, the second one in four's."""
    rows = []
    for number in range(count):
        ids = [0, 1 + number % 4, 100 + number]
        row = {"timestamp": number * step_ms, "input_length": tokens, "output_length": output, "hash_ids": ids}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return path
