"""What formats of one JSON object per line have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mooncake.trace.lines import BadLine, shown

Row = TypeVar("Row")
HashId = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class _Label(msgspec.Struct):
    synthetic: bool = False


def mentions(line: bytes, *names: str) -> bool:
    """Whether the line looks like a JSON object with one of these fields, sound or not."""
    return line.lstrip().startswith(b"{") and any(f'"{name}"'.encode() in line for name in names)


def is_synthetic(line: bytes) -> bool:
    try:
        return msgspec.json.decode(line, type=_Label).synthetic
    except (msgspec.DecodeError, RecursionError):
        return False


def batches(decoder: msgspec.json.Decoder[Row], runs: Iterable[bytes]) -> Iterator[list[Row]]:
    """Rows of each run of lines, up to the first that is wrong; then raises BadLine for that one."""
    for run in runs:
        try:
            rows = decoder.decode_lines(run)
        except (msgspec.DecodeError, RecursionError):
            rows = []
        if len(rows) == run.count(b"\n") + 1:
            yield rows
            continue
        # Fewer rows than lines: an empty line, which decode_lines does not mind. More: two objects in one line.
        rows, fault = _one_by_one(decoder, run)
        yield rows
        if fault is not None:
            raise fault


def check_hash_ids(hash_ids: tuple[int, ...], input_length: int, block_tokens: int) -> None:
    num_blocks = -(-input_length // block_tokens)
    if len(hash_ids) != num_blocks:
        needed = f"input_length = {input_length} needs {num_blocks}, one for each {block_tokens} tokens"
        raise BadLine(f"hash_ids has {len(hash_ids)} ids, and {needed}")


def _one_by_one(decoder: msgspec.json.Decoder[Row], run: bytes) -> tuple[list[Row], BadLine | None]:
    rows: list[Row] = []
    for line in run.split(b"\n"):
        try:
            rows.append(decoder.decode(line))
        except (msgspec.DecodeError, RecursionError) as error:
            return rows, BadLine(_explain(line, error), line)
    return rows, None


def _explain(line: bytes, error: Exception) -> str:
    if not line.strip():
        return "empty"
    try:
        whole = msgspec.json.decode(line)
    except msgspec.DecodeError as fault:
        reason = _plain(str(fault).removeprefix("JSON is malformed: ").partition(" - at ")[0])
        if b"NaN" in line or b"Infinity" in line:
            reason = "it has no NaN and no Infinity"
        return f"not JSON: {reason}, in {shown(line)}"
    except RecursionError:
        return "nested too deeply"
    if not isinstance(whole, dict):
        return f"expected a JSON object, got {shown(line)}"
    reason, _, place = str(error).partition(" - at `$.")
    if not place:
        return _plain(reason.removeprefix("Object "))
    field = place.rstrip("`")
    return f"{field} = {shown(whole.get(field.partition('[')[0]))}: {_plain(reason)}"


def _plain(text: str) -> str:
    return (text[:1].lower() + text[1:]).replace("`", "")
