"""Attention over paged KV, behind transformers' attention interface.

The forward is one packed row of tokens: chunks of prompts and single decode tokens of many sequences. For each layer the new
keys and values go into their slots, the after-layer hook is called, and every item attends to its own pages:

* A prefill item, to a view of its pages, with a causal mask that is shared by all layers.
* Decode items whose first slots are rows of a common stride, all in one call: a strided view [rows, longest, heads, dim] over
  the pool, rows overlapping where sequences are longer than the stride, and a mask for what is not theirs. One call instead
  of one per sequence saves the waking of threads.
* Other decode items, one by one, to views.
* A sequence whose pages are not one run is gathered first; `gathered_bytes` counts that.

Grouped queries need no copies of keys: the queries of a group become rows of one query (decode), or keys are expanded with
stride 0 (prefill).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from mooncake.engine.base import LayerHook, LayerLoad, StepItem
from mooncake.engine.torch.pages import PageMemory, first_slot, slots

NAME = "mooncake_paged"
WASTE_MAX = 2.0
"""A padded call may look at this many times the tokens that are really there; beyond that single calls are faster."""
KNOWN_KEYWORDS = frozenset(
    {"paged", "dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions",
     "output_hidden_states", "cache_position", "logits_to_keep", "num_items_in_batch", "position_embeddings", "return_dict"}
)  # fmt: skip
"""What models may pass on to the attention function; others change its meaning and are refused at load."""


class _Item:
    """Where one item's queries and keys are. first: slot of its first token, or None if its pages are not one run."""

    __slots__ = ("count", "first", "gather", "length", "masks", "query")

    def __init__(self, item: StepItem, query: int, page_tokens: int, device: torch.device) -> None:
        self.query = query
        self.count = item.count
        self.length = item.start + item.count
        self.first = first_slot(item.pages, page_tokens, self.length)
        self.gather: torch.Tensor | None = None
        if self.first is None:
            self.gather = torch.from_numpy(slots(item.pages, page_tokens, 0, self.length)).to(device)
        self.masks: dict[int | None, torch.Tensor | None] = {}


class _Rows:
    """Decode items in one strided view: row r of the view is the sequence that starts at first + r * stride."""

    __slots__ = ("first", "lengths", "longest", "masks", "num_rows", "queries", "rows", "stride")

    def __init__(self, items: Sequence[_Item], first: int, stride: int, num_rows: int, device: torch.device) -> None:
        self.first, self.stride, self.num_rows = first, stride, num_rows
        self.longest = max(item.length for item in items)
        self.rows = torch.tensor([((item.first or 0) - first) // stride for item in items], device=device)
        self.queries = torch.tensor([item.query for item in items], device=device)
        self.lengths = torch.ones(num_rows, dtype=torch.long, device=device)
        self.lengths[self.rows] = torch.tensor([item.length for item in items], device=device)
        self.masks: dict[int | None, torch.Tensor] = {}


class PagedBatch:
    """One step, as the attention function needs it. Passed through the model's forward as the keyword `paged`."""

    def __init__(
        self,
        items: Sequence[StepItem],
        memory: PageMemory,
        after_layer: LayerHook | None,
        loads: Mapping[int, LayerLoad],
    ) -> None:
        self.memory = memory
        self.gathered_bytes = 0
        self.failed: dict[int, None] = {}
        self.layers_seen: list[int] = []
        self._after_layer = after_layer
        self._loads = [(item.seq, loads[item.seq]) for item in items if item.num_loading]
        device = memory.kv.device
        new_slots = np.concatenate([slots(i.pages, memory.page_tokens, i.start, i.count) for i in items])
        self._slots = torch.from_numpy(new_slots).to(device)
        prefill: list[_Item] = []
        decode: list[_Item] = []
        query = 0
        for item in items:
            (decode if item.count == 1 else prefill).append(_Item(item, query, memory.page_tokens, device))
            query += item.count
        self._singles = prefill
        self._rows = _as_rows(decode, memory.kv.shape[1], device)
        if self._rows is None:
            self._singles = prefill + decode
        else:
            self._singles = prefill + [item for item in decode if item.first is None]

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
        self._wait(layer)
        kv = self.memory.kv[layer]
        kv[:, 0].index_copy_(0, self._slots, key[0].transpose(0, 1))
        kv[:, 1].index_copy_(0, self._slots, value[0].transpose(0, 1))
        self.layers_seen.append(layer)
        self.memory.mark(layer)
        if self._after_layer is not None:
            self._after_layer(layer)
        _, num_heads, num_tokens, dim = query.shape
        num_kv = key.shape[1]
        grouped = query.view(num_kv, num_heads // num_kv, num_tokens, dim)
        out = query.new_empty((num_tokens, num_kv, num_heads // num_kv, dim))
        if self._rows is not None:
            self._attend_rows(self._rows, kv, grouped, out, scaling, window)
        for item in self._singles:
            self._attend_single(item, kv, grouped, out, scaling, window)
        return out.view(1, num_tokens, num_heads, dim)

    def _wait(self, layer: int) -> None:
        for seq, load in self._loads:
            if seq not in self.failed and not load.wait(layer):
                self.failed[seq] = None

    def _attend_rows(
        self,
        rows: _Rows,
        kv: torch.Tensor,
        grouped: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> None:
        num_kv, group, _, dim = grouped.shape
        token = kv.stride(0)
        shape = (rows.num_rows, num_kv, rows.longest, dim)
        strides = (rows.stride * token, kv.stride(2), token, 1)
        base = kv.storage_offset() + rows.first * token
        keys = kv.as_strided(shape, strides, base)
        values = kv.as_strided(shape, strides, base + kv.stride(1))
        query = grouped.new_zeros((rows.num_rows, num_kv, group, dim))
        query[rows.rows] = grouped[:, :, rows.queries].permute(2, 0, 1, 3)
        mask = rows.masks.get(window)
        if mask is None:
            mask = rows.masks[window] = _row_mask(rows.lengths, rows.longest, window, query.dtype)
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        out[rows.queries] = found[rows.rows]

    def _attend_single(
        self,
        item: _Item,
        kv: torch.Tensor,
        grouped: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> None:
        begin = max(0, item.length - window) if window is not None and item.count == 1 else 0
        if item.gather is None:
            assert item.first is not None
            seen = kv[item.first + begin : item.first + item.length]
        else:
            seen = kv.index_select(0, item.gather[begin:])
            self.gathered_bytes += seen.nbytes
        keys, values = seen[:, 0].transpose(0, 1), seen[:, 1].transpose(0, 1)
        query = grouped[:, :, item.query : item.query + item.count]
        target = out[item.query : item.query + item.count]
        if item.count == 1:
            found = functional.scaled_dot_product_attention(
                query[:, :, 0].unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), scale=scaling
            )
            target.copy_(found)
            return
        if window not in item.masks:
            item.masks[window] = _chunk_mask(item.count, item.length, window, query)
        mask = item.masks[window]
        expanded = (keys.shape[0], grouped.shape[1], item.length, keys.shape[2])
        found = functional.scaled_dot_product_attention(
            query,
            keys.unsqueeze(1).expand(expanded),
            values.unsqueeze(1).expand(expanded),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
        )
        target.copy_(found.permute(2, 0, 1, 3))


def _as_rows(decode: Sequence[_Item], num_slots: int, device: torch.device) -> _Rows | None:
    """The decode items that can be one strided view, if that is worth it."""
    items = [item for item in decode if item.first is not None]
    firsts = sorted(item.first for item in items if item.first is not None)
    if len(items) < 2 or len(set(firsts)) < len(firsts):
        return None
    stride = math.gcd(*(later - firsts[0] for later in firsts[1:]))
    num_rows = (firsts[-1] - firsts[0]) // stride + 1
    longest = max(item.length for item in items)
    if num_rows * longest > WASTE_MAX * sum(item.length for item in items) or firsts[-1] + longest > num_slots:
        return None
    return _Rows(items, firsts[0], stride, num_rows, device)


def _row_mask(lengths: torch.Tensor, longest: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive, [rows, 1, 1, longest]."""
    positions = torch.arange(longest, device=lengths.device)
    hidden = positions >= lengths[:, None]
    if window is not None:
        hidden |= positions < lengths[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def _chunk_mask(count: int, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Additive, [count, length], for the last `count` positions of `length`; None where plain causal attention will do."""
    if count == length and (window is None or length <= window):
        return None
    rows = torch.arange(length - count, length, device=like.device)[:, None]
    columns = torch.arange(length, device=like.device)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    mask = torch.zeros((count, length), dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)


Observer = Callable[[int, dict[str, Any]], None]


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
    paged: PagedBatch = keywords["paged"]
    unknown = [name for name, given in keywords.items() if name not in KNOWN_KEYWORDS and given is not None]
    if unknown:
        raise UnknownSemantics(f"its attention takes {', '.join(sorted(unknown))}")
    return paged.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


class UnknownSemantics(Exception):
    """The model asks its attention for something that is not done here."""
