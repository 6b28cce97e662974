"""A request of a trace, and what a trace is."""

from __future__ import annotations

import msgspec

TOKENS_MAX = 1 << 30
"""Of one prompt or one output: more than any model takes, so that a stray number is refused and sums stay exact."""


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """arrival_ns: since the first request of the file. hash_ids: one for each block of the prompt, the partial last one
    included; equal ids mean equal prompts up to the end of that block. None: the format says nothing of prefixes. session:
    the conversation that it belongs to, where the format has it."""

    arrival_ns: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] | None = None
    session: str | None = None


class TraceFormat(msgspec.Struct, frozen=True):
    """block_tokens: tokens of a block that has a hash id; None without prefix information."""

    name: str
    block_tokens: int | None

    @property
    def has_prefixes(self) -> bool:
        return self.block_tokens is not None


class TraceInfo(msgspec.Struct, frozen=True):
    """synthetic: made by `mooncake trace synth`, its prefixes included."""

    path: str
    format: TraceFormat
    synthetic: bool


class TraceSummary(msgspec.Struct, frozen=True):
    """num_skipped: requests that failed when the trace was taken, without a token of output; readers leave them out."""

    info: TraceInfo
    num_requests: int
    num_skipped: int
    span_ns: int
    input_tokens: int
    output_tokens: int
