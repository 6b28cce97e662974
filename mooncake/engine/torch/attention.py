"""Attention over paged KV, behind transformers' attention interface.

The forward is one packed row of tokens: chunks of prompts and single decode tokens of many sequences. Each item attends to
its own context in pieces: a decode token is one, a prompt from its first token on is one without a mask, and another chunk has
one for every `_PIECE_TOKENS` tokens, so that little is computed above the diagonal or before the window. There the queries of
a group become rows of one query, token by token, so keys are never copied for grouped heads, and the CPU kernel gets the tall
blocks that it is fastest with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
import torch
import torch.nn.functional as functional

from mooncake.engine.base import StepItem
from mooncake.engine.torch.pages import first_slot, slots

NAME = "mooncake_paged"
_PIECE_TOKENS = 256
KNOWN_KEYWORDS = frozenset(
    {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions", "return_dict",
     "output_hidden_states", "cache_position", "logits_to_keep", "num_items_in_batch", "output_router_logits",
     "position_embeddings"}
)  # fmt: skip
"""What models may pass on to the attention function; others change its meaning and are refused at load."""


class Piece(msgspec.Struct, frozen=True):
    """Queries [start, stop) of the packed row, which see tokens [begin, end) of their sequence, but for what `mask` (additive,
    [queries * group, end - begin]) hides. causal: they see as many of them as there are, the first query one."""

    start: int
    stop: int
    begin: int
    end: int
    mask: torch.Tensor | None = None
    causal: bool = False


class PackedItem:
    """Where one item's queries and context are.

    query: its first query in the packed row. first: the slot of its sequence's first token, or None if its pages are not one
    run; then `gather` has all slots."""

    __slots__ = ("_pieces", "count", "first", "gather", "length", "query")

    def __init__(self, item: StepItem, query: int, page_tokens: int, device: torch.device) -> None:
        self.query = query
        self.count = item.count
        self.length = item.start + item.count
        self.first = first_slot(item.pages, page_tokens, self.length)
        self.gather: torch.Tensor | None = None
        if self.first is None:
            self.gather = torch.from_numpy(slots(item.pages, page_tokens, 0, self.length)).to(device)
        self._pieces: dict[tuple[int | None, int], tuple[Piece, ...]] = {}

    def pieces(self, window: int | None, group: int, like: torch.Tensor) -> tuple[Piece, ...]:
        """The same for all layers of one window. like: any tensor of the masks' type and device."""
        found = self._pieces.get((window, group))
        if found is None:
            found = self._pieces[window, group] = tuple(self._cut(window, group, like))
        return found

    def _cut(self, window: int | None, group: int, like: torch.Tensor) -> Iterator[Piece]:
        known = self.length - self.count
        if known == 0 and self.count > 1 and (window is None or self.count <= window):
            yield Piece(self.query, self.query + self.count, 0, self.count, causal=True)
            return
        for at in range(0, self.count, _PIECE_TOKENS):
            stop = min(at + _PIECE_TOKENS, self.count)
            begin = 0 if window is None else max(0, known + at + 1 - window)
            mask = None
            if stop - at > 1:
                mask = _causal_mask(known + at, known + stop, begin, window, like).repeat_interleave(group, dim=0)
            yield Piece(self.query + at, self.query + stop, begin, known + stop, mask)


def _causal_mask(first: int, end: int, begin: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Additive, for queries at positions [first, end) and keys at [begin, end)."""
    rows = torch.arange(first, end, device=like.device)[:, None]
    columns = torch.arange(begin, end, device=like.device)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)


def attend_piece(
    piece: Piece, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """query: [kv_heads, group, tokens, dim] of the packed row; keys, values: [kv_heads, tokens, dim] of [begin, end). Returns
    [tokens of the piece, kv_heads, group, dim]."""
    num_kv, group, _, dim = query.shape
    mine = query[:, :, piece.start : piece.stop]
    if piece.causal:
        rows = mine.flatten(0, 1).unsqueeze(0)
        found = functional.scaled_dot_product_attention(
            rows, keys.unsqueeze(0), values.unsqueeze(0), is_causal=True, scale=scale, enable_gqa=group > 1
        )
        return found.view(num_kv, group, -1, values.shape[-1]).permute(2, 0, 1, 3)
    rows = mine.transpose(1, 2).reshape(1, num_kv, -1, dim)
    found = functional.scaled_dot_product_attention(
        rows, keys.unsqueeze(0), values.unsqueeze(0), attn_mask=piece.mask, scale=scale
    )
    return found.view(num_kv, -1, group, values.shape[-1]).transpose(0, 1)


class PackedStep(Protocol):
    """One step, as the attention function needs it."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """query: [1, heads, tokens, dim]; key, value: [1, kv_heads, tokens, dim]. Returns [1, tokens, heads, dim]."""
        ...


class RunningStep:
    """The step that a model is computing, where its attention modules find it: not every model passes keywords on to them."""

    def __init__(self, model: Any) -> None:
        self.step: PackedStep | None = None
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.running = self


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls once per layer."""
    unknown = [name for name, given in keywords.items() if name not in KNOWN_KEYWORDS and given is not None]
    if unknown:
        raise UnknownSemantics(f"its attention takes {', '.join(sorted(unknown))}")
    step: PackedStep = module.running.step
    return step.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


class UnknownSemantics(Exception):
    """The model asks its attention for something that is not done here."""
