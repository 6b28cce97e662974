"""Traces of Alibaba's Bailian (qwen-bailian-usagetraces-anon): one JSON object per line; timestamp in seconds; blocks of 16
tokens; chats that continue others.

What is published says that each block is hashed, not that the hashes are chained. So ids are chained here: equal ids then mean
equal prompts up to there, whichever is the case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from mooncake.core.types import NANOS_PER_S
from mooncake.trace.formats import jsonl
from mooncake.trace.formats.base import SECONDS_MAX
from mooncake.trace.types import TOKENS_MAX, TraceFormat, TraceRequest

CHATS_MAX = 1 << 20
"""Chats whose beginning is remembered, the last ones: a continuation of an older one counts as a session of its own."""

_NO_PARENT = -1


class _Row(msgspec.Struct, gc=False):
    chat_id: int
    timestamp: Annotated[float, Meta(ge=0, le=SECONDS_MAX)]
    input_length: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
    output_length: Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
    hash_ids: tuple[jsonl.HashId, ...]
    parent_chat_id: int = _NO_PARENT


class _Line(msgspec.Struct, omit_defaults=True):
    chat_id: int
    parent_chat_id: int
    timestamp: float
    input_length: int
    output_length: int
    type: str
    turn: int
    hash_ids: tuple[int, ...]
    synthetic: bool = False


class Bailian:
    format = TraceFormat("bailian", 16)
    num_header_lines = 0

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Row)
        self._encoder = msgspec.json.Encoder()

    def claims(self, line: bytes) -> bool:
        return jsonl.mentions(line, "chat_id")

    def is_synthetic(self, line: bytes) -> bool:
        return jsonl.is_synthetic(line)

    def parse(self, runs: Iterable[bytes]) -> Iterator[TraceRequest | None]:
        zero: int | None = None
        roots: dict[int, int] = {}
        for rows in jsonl.batches(self._decoder, runs):
            for row, hash_ids in zip(rows, chained([row.hash_ids for row in rows]), strict=True):
                if len(row.hash_ids) != (row.input_length + 15) >> 4:
                    jsonl.check_hash_ids(row.hash_ids, row.input_length, 16)
                arrival = round(row.timestamp * NANOS_PER_S)
                if zero is None:
                    zero = arrival
                session = str(_root_of(row, roots))
                if row.output_length:
                    yield TraceRequest(arrival - zero, row.input_length, row.output_length, hash_ids, session)
                else:
                    yield None

    def encode(self, request: TraceRequest, number: int, *, synthetic: bool) -> bytes:
        assert request.hash_ids is not None
        at = request.arrival_ns / NANOS_PER_S
        lengths = request.input_length, request.output_length
        return self._encoder.encode(_Line(number, _NO_PARENT, at, *lengths, "text", 1, request.hash_ids, synthetic))


def chained(ids_of_blocks: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Ids of whole prefixes from ids of single blocks, request by request: sums over the prefix, with a weight for each place,
    modulo 2**64. A pure function."""
    lengths = np.array([len(ids) for ids in ids_of_blocks], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    flat = np.fromiter(chain.from_iterable(ids_of_blocks), dtype=np.int64, count=int(lengths.sum())).view(np.uint64)
    places = np.arange(len(flat)) - np.repeat(starts, lengths)
    weights = _weights(int(lengths.max(initial=0)))
    sums = np.cumsum((flat + np.uint64(1)) * weights[places], dtype=np.uint64)
    before = np.concatenate((np.zeros(1, np.uint64), sums))[starts]
    prefixes = (sums - np.repeat(before, lengths)).view(np.int64).tolist()
    return [
        tuple(prefixes[start : start + length]) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


def _weights(number: int) -> np.ndarray:
    """Odd numbers without a pattern: splitmix64 of 1, 2 and so on."""
    mixed = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


def _root_of(row: _Row, roots: dict[int, int]) -> int:
    """The chat that began this one; it is remembered for those that continue it."""
    root = roots.get(row.parent_chat_id, row.chat_id)
    roots[row.chat_id] = root
    if len(roots) > CHATS_MAX:
        del roots[next(iter(roots))]
    return root
