"""One step of packed items over paged KV, in its two forms.

`HeadsBatch`: keys and values of each head, as most models have them. Decode items whose first slots are rows of a common
stride are attended to in one call: a strided view [rows, heads, longest, dim] over the pool, rows overlapping where sequences
are longer than the stride, and a mask for what is not theirs. One call instead of one per sequence saves the waking of threads.
All other items are attended to one by one, through views of their pages.

A mask weighs what is hidden with zero, but zero times NaN is NaN: one sequence's sick KV would spread to all in its call. So
the call is not made where KV leaves layer by layer (`together` is False), and a step that finds a NaN in its logits is computed
again that way (`mooncake.engine.torch.step_engine`).

`LatentBatch`: multi-head latent attention (DeepSeek-V3 and its kin). The pages hold what keys and values are expanded from; the
model hands it over and gets back the latents of all contexts, one after the other.

A sequence whose pages are not one run is gathered first; `gathered_bytes` counts that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as functional

from mooncake.engine.base import LayerHook, LayerLoad, StepItem
from mooncake.engine.torch.attention import PackedItem, Piece, attend_piece
from mooncake.engine.torch.pages import PageMemory, slots

_WASTE_MAX = 2.0
"""A padded call may look at this many times the tokens that are really there; beyond that single calls are faster."""


class LayerWriter:
    """Puts a layer's new KV into its slots: after the loads that the step waits for, before the after-layer hook.

    failed: sequences whose load failed (a dict for its order). layers_seen: in the order of the calls."""

    def __init__(
        self,
        items: Sequence[StepItem],
        memory: PageMemory,
        after_layer: LayerHook | None,
        loads: Mapping[int, LayerLoad],
    ) -> None:
        self.failed: dict[int, None] = {}
        self.layers_seen: list[int] = []
        self._memory = memory
        self._after_layer = after_layer
        self._loads = [(item.seq, loads[item.seq]) for item in items if item.num_loading]
        new_slots = np.concatenate([slots(i.pages, memory.page_tokens, i.start, i.count) for i in items])
        first, end = int(new_slots[0]), int(new_slots[-1]) + 1
        self._run = slice(first, end) if end - first == len(new_slots) and np.all(np.diff(new_slots) == 1) else None
        self._slots = torch.from_numpy(new_slots).to(memory.kv.device)

    def put(self, layer: int, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """parts: (the pages' slots, all of them, of some part of the KV; that part of the new tokens)."""
        for seq, load in self._loads:
            if seq not in self.failed and not load.wait(layer):
                self.failed[seq] = None
        for target, new in parts:
            if self._run is not None:
                target[self._run].copy_(new)
            else:
                target.index_copy_(0, self._slots, new)
        self.layers_seen.append(layer)
        self._memory.mark(layer)
        if self._after_layer is not None:
            self._after_layer(layer)


def pack(items: Sequence[StepItem], memory: PageMemory) -> list[PackedItem]:
    packed: list[PackedItem] = []
    query = 0
    for item in items:
        packed.append(PackedItem(item, query, memory.page_tokens, memory.kv.device))
        query += item.count
    return packed


class HeadsBatch:
    """kv[layer]: [slots, 2, kv_heads, dim]."""

    past_key_values = None

    def __init__(self, items: Sequence[StepItem], memory: PageMemory, writer: LayerWriter, together: bool) -> None:
        self.gathered_bytes = 0
        self._kv = memory.kv
        self._writer = writer
        packed = pack(items, memory)
        self._rows: _Rows | None = None
        self._singles = packed
        if together:
            self._rows = _as_rows([item for item in packed if item.count == 1], memory.kv.shape[1], memory.kv.device)
        if self._rows is not None:
            self._singles = [item for item in packed if item.count > 1 or item.first is None]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        kv = self._kv[layer]
        self._writer.put(layer, ((kv[:, 0], key[0].transpose(0, 1)), (kv[:, 1], value[0].transpose(0, 1))))
        _, num_heads, num_tokens, dim = query.shape
        num_kv = key.shape[1]
        grouped = query.view(num_kv, num_heads // num_kv, num_tokens, dim)
        singles = [
            attended for item in self._singles for attended in self._attend_single(item, kv, grouped, scaling, window)
        ]
        if self._rows is None and len(singles) == 1:  # a prompt alone, a reply alone: nothing to put together
            return singles[0][1].reshape(1, num_tokens, num_heads, dim)
        out = query.new_empty((num_tokens, num_kv, num_heads // num_kv, dim))
        if self._rows is not None:
            self._rows.attend(kv, grouped, out, scaling, window)
        for piece, found in singles:
            out[piece.start : piece.stop].copy_(found)
        return out.view(1, num_tokens, num_heads, dim)

    def _attend_single(
        self, item: PackedItem, kv: torch.Tensor, grouped: torch.Tensor, scaling: float | None, window: int | None
    ) -> list[tuple[Piece, torch.Tensor]]:
        pieces = item.pieces(window, grouped.shape[1], grouped)
        origin = pieces[0].begin
        if item.gather is None:
            assert item.first is not None
            seen = kv[item.first + origin : item.first + item.length]
        else:
            seen = kv.index_select(0, item.gather[origin:])
            self.gathered_bytes += seen.nbytes
        keys, values = seen[:, 0].transpose(0, 1), seen[:, 1].transpose(0, 1)
        found: list[tuple[Piece, torch.Tensor]] = []
        for piece in pieces:
            seen_by = slice(piece.begin - origin, piece.end - origin)
            found.append((piece, attend_piece(piece, grouped, keys[:, seen_by], values[:, seen_by], scaling)))
        return found


class _Rows:
    """Decode items in one strided view: row r of the view is the sequence that starts at first + r * stride."""

    def __init__(
        self, items: Sequence[PackedItem], first: int, stride: int, num_rows: int, device: torch.device
    ) -> None:
        self._first, self._stride, self._num_rows = first, stride, num_rows
        self._longest = max(item.length for item in items)
        self._rows = torch.tensor([((item.first or 0) - first) // stride for item in items], device=device)
        self._queries = torch.tensor([item.query for item in items], device=device)
        # A row that is nobody's sees one token: a row that sees none gives no number.
        self._lengths = torch.ones(num_rows, dtype=torch.long, device=device)
        self._lengths[self._rows] = torch.tensor([item.length for item in items], device=device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, kv: torch.Tensor, grouped: torch.Tensor, out: torch.Tensor, scaling: float | None, window: int | None
    ) -> None:
        num_kv, group, _, dim = grouped.shape
        token = kv.stride(0)
        shape = (self._num_rows, num_kv, self._longest, dim)
        strides = (self._stride * token, kv.stride(2), token, 1)
        base = kv.storage_offset() + self._first * token
        keys = kv.as_strided(shape, strides, base)
        values = kv.as_strided(shape, strides, base + kv.stride(1))
        # index_select and index_copy_ rather than indexing, which wakes all threads for these few bytes.
        query = grouped.new_zeros((self._num_rows, num_kv, group, dim))
        query.index_copy_(0, self._rows, grouped.permute(2, 0, 1, 3).index_select(0, self._queries))
        mask = self._masks.get(window)
        if mask is None:
            mask = self._masks[window] = self._mask(window, query.dtype)
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        out.index_copy_(0, self._queries, found.index_select(0, self._rows))

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive, [rows, 1, 1, longest]."""
        positions = torch.arange(self._longest, device=self._lengths.device)
        hidden = positions >= self._lengths[:, None]
        if window is not None:
            hidden |= positions < self._lengths[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self._lengths.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def _as_rows(decode: Sequence[PackedItem], num_slots: int, device: torch.device) -> _Rows | None:
    """The decode items that can be one strided view, if that is worth it."""
    items = [item for item in decode if item.first is not None]
    firsts = sorted(item.first for item in items if item.first is not None)
    if len(items) < 2 or len(set(firsts)) < len(firsts):
        return None
    stride = math.gcd(*(later - firsts[0] for later in firsts[1:]))
    num_rows = (firsts[-1] - firsts[0]) // stride + 1
    longest = max(item.length for item in items)
    if num_rows * longest > _WASTE_MAX * sum(item.length for item in items) or firsts[-1] + longest > num_slots:
        return None
    return _Rows(items, firsts[0], stride, num_rows, device)


class LatentBatch:
    """kv[layer]: [slots, latent + rope]. It is also the `past_key_values` of the forward: the model calls `update`. Items never
    share a call, whatever `together` says."""

    def __init__(self, items: Sequence[StepItem], memory: PageMemory, writer: LayerWriter, together: bool) -> None:
        self.gathered_bytes = 0
        self._kv = memory.kv
        self._writer = writer
        self._packed = pack(items, memory)
        contexts = [slots(item.pages, memory.page_tokens, 0, item.start + item.count) for item in items]
        self._gather = torch.from_numpy(np.concatenate(contexts)).to(memory.kv.device)

    @property
    def past_key_values(self) -> LatentBatch:
        return self

    def update(self, latent: torch.Tensor, rope: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """latent, rope: [1, 1, tokens, size] of the new tokens; returns them of all contexts."""
        kv = self._kv[layer]
        size = latent.shape[-1]
        self._writer.put(layer, ((kv[:, :size], latent[0, 0]), (kv[:, size:], rope[0, 0])))
        alone = self._packed[0]
        if len(self._packed) == 1 and alone.first is not None:
            seen = kv[alone.first : alone.first + alone.length]
        else:
            seen = kv.index_select(0, self._gather)
            self.gathered_bytes += seen.nbytes
        return seen[None, None, :, :size], seen[None, None, :, size:]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """key, value: [1, heads, tokens of all contexts, dim], expanded by the model."""
        _, num_heads, num_tokens, _ = query.shape
        grouped = query[0].unsqueeze(1)
        out = query.new_empty((num_tokens, num_heads, 1, value.shape[-1]))
        first = 0
        for item in self._packed:
            for piece in item.pieces(window, 1, query):
                seen = slice(first + piece.begin, first + piece.end)
                found = attend_piece(piece, grouped, key[0, :, seen], value[0, :, seen], scaling)
                out[piece.start : piece.stop].copy_(found)
            first += item.length
        return out.view(1, num_tokens, num_heads, value.shape[-1])
