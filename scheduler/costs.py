"""Predicted times of every candidate at once, in nanoseconds, as float64 arrays by slot. Pure functions of the view.

TTFT = queue + load + prefill
queue    until the work booked or reported there is done, one request after the other
load     bytes of the reused blocks that are not in the instance's own pages, over the bandwidth of where they lie
prefill  a + n (b + c (P + n/2)) for n computed tokens after P reused ones
TBT  = a + b B + c ctx, the step time of the decode batch with this request's choices in it
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np

from mooncake.core.types import NANOS_PER_S
from mooncake.scheduler.config import Rates
from mooncake.scheduler.prefix_index import ANY, EXPECTED, FAST, Match
from mooncake.scheduler.view import View


class BlockCosts(msgspec.Struct, frozen=True):
    """Nanoseconds to load one block, by where it lies. Remote comes on top of dram being read there, so it is the
    slower of both."""

    tokens: int
    dram_ns: float
    ssd_ns: float
    remote_ns: float

    @classmethod
    def of(cls, block_tokens: int, kv_token_bytes: int, rates: Rates) -> BlockCosts:
        block_ns = block_tokens * kv_token_bytes * NANOS_PER_S
        return cls(
            tokens=block_tokens,
            dram_ns=block_ns / rates.dram_bytes_per_s,
            ssd_ns=block_ns / rates.ssd_bytes_per_s,
            remote_ns=block_ns / min(rates.remote_bytes_per_s, rates.dram_bytes_per_s),
        )


class Reuse(msgspec.Struct):
    """What every prefill candidate would reuse, by slot."""

    own: np.ndarray
    """Leading blocks in its own pages now."""
    blocks: np.ndarray
    """Leading blocks reused, own ones included."""
    node: np.ndarray
    """Slot of the store node that the blocks beyond its own come from, or 0."""
    load_ns: np.ndarray


class PrefillTerms(msgspec.Struct):
    queue_ns: np.ndarray
    load_ns: np.ndarray
    prefill_ns: np.ndarray
    ttft_ns: np.ndarray


class DecodeTerms(msgspec.Struct):
    num_seqs: np.ndarray
    """Sequences there without this request's: in the batch, waiting, or booked."""
    tbt_ns: np.ndarray
    fits: np.ndarray
    """Whether the batch has room and the free pages suffice for the expected length."""


def local_reuse(view: View, match: Match, costs: BlockCosts) -> Reuse:
    """Each instance takes what it or its own node has, or will have when the request's turn comes."""
    lengths = match.lengths
    node = view.columns.node
    own = lengths[:, FAST]
    stored = lengths[node, ANY]
    blocks = np.maximum(lengths[:, EXPECTED], stored)
    slow = np.maximum(stored - np.maximum(own, lengths[node, FAST]), 0)
    load_ns = (blocks - own - slow) * costs.dram_ns + slow * costs.ssd_ns
    return Reuse(own, blocks, node, load_ns)


def best_node(view: View, match: Match) -> tuple[int, int, int]:
    """The store node with the longest confirmed match: slot, blocks, and how many of them only its ssd has."""
    lengths = match.lengths * view.columns.is_node[:, np.newaxis]
    slot = int(lengths[:, ANY].argmax())
    blocks = int(lengths[slot, ANY])
    return slot, blocks, blocks - int(lengths[slot, FAST])


def prefill_terms(view: View, reuse: Reuse, num_tokens: int, block_tokens: int, now: int) -> PrefillTerms:
    columns = view.columns
    queue = np.maximum(np.maximum(columns.busy_until, columns.backlog_until) - now, 0)
    prefix = reuse.blocks * block_tokens
    new = num_tokens - prefix
    prefill = columns.prefill_a + new * (columns.prefill_b + columns.prefill_c * (prefix + new * 0.5))
    return PrefillTerms(queue, reuse.load_ns, prefill, queue + reuse.load_ns + prefill)


PagesT = TypeVar("PagesT", int, np.ndarray)


def sibling_pages(num_output: int, page_tokens: PagesT) -> PagesT:
    """What another choice needs beside the prompt's whole pages, which the first one has: its own output, and a copy of the
    last, partial page."""
    return 1 + -(-num_output // page_tokens)


def num_pages(num_tokens: int, num_output: int, num_choices: int, page_tokens: PagesT) -> PagesT:
    pages = -(-(num_tokens + num_output) // page_tokens)
    if num_choices > 1:
        pages = pages + (num_choices - 1) * sibling_pages(num_output, page_tokens)
    return pages


def decode_terms(view: View, num_tokens: int, num_output: int, num_choices: int) -> DecodeTerms:
    """num_tokens, num_output: of each choice."""
    columns = view.columns
    num_seqs = columns.num_seqs + columns.pending_seqs
    grown = num_seqs + num_choices
    context = columns.context_tokens + columns.pending_tokens + num_choices * num_tokens
    tbt = columns.decode_a + columns.decode_b * np.minimum(grown, columns.max_batch) + columns.decode_c * context
    pages = num_pages(num_tokens, num_output, num_choices, columns.page_tokens)
    fits = (grown <= columns.max_batch) & (columns.free_pages - columns.pending_pages >= pages)
    return DecodeTerms(num_seqs, tbt, fits)
