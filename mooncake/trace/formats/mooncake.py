"""Mooncake's traces: one JSON object per line; timestamp in milliseconds; blocks of 512 tokens with chained ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from mooncake.core.types import NANOS_PER_MS
from mooncake.trace.formats import jsonl
from mooncake.trace.formats.base import SECONDS_MAX
from mooncake.trace.lines import BadLine
from mooncake.trace.types import TOKENS_MAX, TraceFormat, TraceRequest

_Milliseconds = Annotated[int, Meta(ge=0, le=SECONDS_MAX * 1000)] | Annotated[float, Meta(ge=0, le=SECONDS_MAX * 1e3)]


class _Row(msgspec.Struct, gc=False):
    """chat_id: no field of this format, so that a Bailian line is none."""

    timestamp: _Milliseconds
    input_length: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
    output_length: Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
    hash_ids: tuple[jsonl.HashId, ...]
    chat_id: None = None


class _Line(msgspec.Struct, omit_defaults=True):
    timestamp: int | float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    synthetic: bool = False


class Mooncake:
    format = TraceFormat("mooncake", 512)
    num_header_lines = 0

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Row)
        self._encoder = msgspec.json.Encoder()

    def claims(self, line: bytes) -> bool:
        return jsonl.mentions(line, "timestamp", "input_length", "hash_ids") and not jsonl.mentions(line, "chat_id")

    def is_synthetic(self, line: bytes) -> bool:
        return jsonl.is_synthetic(line)

    def parse(self, runs: Iterable[bytes]) -> Iterator[TraceRequest | None]:
        zero: int | None = None
        for rows in jsonl.batches(self._decoder, runs):
            for row in rows:
                hash_ids = row.hash_ids
                if len(hash_ids) != (row.input_length + 511) >> 9:
                    jsonl.check_hash_ids(hash_ids, row.input_length, 512)
                if len(set(hash_ids)) != len(hash_ids):
                    raise BadLine("hash_ids has an id twice, and an id stands for a whole prefix")
                at = row.timestamp
                arrival = at * NANOS_PER_MS if type(at) is int else round(at * NANOS_PER_MS)
                if zero is None:
                    zero = arrival
                if row.output_length:
                    yield TraceRequest(arrival - zero, row.input_length, row.output_length, hash_ids)
                else:
                    yield None

    def encode(self, request: TraceRequest, number: int, *, synthetic: bool) -> bytes:
        ms, rest = divmod(request.arrival_ns, NANOS_PER_MS)
        assert request.hash_ids is not None
        at = request.arrival_ns / NANOS_PER_MS if rest else ms
        return self._encoder.encode(_Line(at, request.input_length, request.output_length, request.hash_ids, synthetic))
