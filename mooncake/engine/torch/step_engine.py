"""The `StepEngine` on torch: one packed forward per step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mooncake.core.costs import fit_decode, fit_prefill
from mooncake.core.types import CostModel, SamplingParams
from mooncake.engine.base import EngineLimits, KvLayout, LayerHook, LayerLoad, StepItem, StepPlan, StepResult
from mooncake.engine.torch.batch import HeadsBatch, LatentBatch, LayerWriter
from mooncake.engine.torch.model import Dimensions
from mooncake.engine.torch.pages import PageMemory, layout_of
from mooncake.engine.torch.sampling import SequenceState, draw_tokens

_MEASURED_CHUNKS = ((64, 0), (256, 0), (256, 256), (512, 0), (256, 768))
"""(new, prefix) tokens of the prefill steps that calibration runs, as far as they fit."""
_MEASURED_BATCHES = ((1, 64), (1, 512), (4, 256), (8, 64))
"""(sequences, context of each) of its decode steps."""


class TorchStepEngine:
    """model: loaded by `load_model`. See `StepEngine`."""

    def __init__(self, model: Any, dims: Dimensions, limits: EngineLimits, device: str) -> None:
        self.limits = limits
        self.vocab_size = dims.vocab_size
        self.gathered_bytes = 0
        """Bytes of context that the last step had to copy together."""
        self.memory = PageMemory(
            dims.num_layers,
            limits.num_pages * limits.page_tokens,
            limits.page_tokens,
            dims.token_shape,
            model.dtype,
            device,
        )
        self.layout: KvLayout = layout_of(self.memory, dims.layout)
        self._batch = LatentBatch if dims.latent else HeadsBatch
        self._model = model
        self._device = device
        self._sequences: dict[int, SequenceState] = {}

    def add_sequence(
        self, seq: int, token_ids: Sequence[int], num_prompt_tokens: int, sampling: SamplingParams, choice: int
    ) -> None:
        self._sequences[seq] = SequenceState(token_ids, num_prompt_tokens, sampling, choice)

    def remove_sequence(self, seq: int) -> None:
        self._sequences.pop(seq, None)

    @torch.inference_mode()
    def run(self, plan: StepPlan, after_layer: LayerHook | None, loads: Mapping[int, LayerLoad]) -> StepResult:
        began = time.monotonic_ns()
        writer = LayerWriter(plan.items, self.memory, after_layer, loads)
        logits = self.forward(plan.items, writer)
        sampled = [item for item in plan.items if item.sample]
        drawn: dict[int, int] = {}
        logprobs: dict[int, Any] = {}
        if sampled:
            sequences = [self._sequences[item.seq] for item in sampled]
            tokens, found = draw_tokens(logits, sequences)
            for item, token, logprob in zip(sampled, tokens, found, strict=True):
                drawn[item.seq], logprobs[item.seq] = token, logprob
                if item.seq not in writer.failed:
                    self._sequences[item.seq].token_ids.append(token)
        return StepResult(
            tokens=tuple((drawn[item.seq],) if item.sample else () for item in plan.items),
            logprobs=tuple(logprobs.get(item.seq, ()) for item in plan.items),
            failed=tuple(writer.failed),
            step_ns=time.monotonic_ns() - began,
        )

    def forward(self, items: Sequence[StepItem], writer: LayerWriter) -> torch.Tensor:
        """Logits of the items that sample, [sampled, vocabulary]."""
        batch = self._batch(items, self.memory, writer)
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        last: list[int] = []
        for item in items:
            tokens.extend(self._sequences[item.seq].token_ids[item.start : item.start + item.count])
            positions.append(np.arange(item.start, item.start + item.count))
            if item.sample:
                last.append(len(tokens) - 1)
        keep = torch.tensor(last or [len(tokens) - 1], device=self._device)
        found = self._model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.from_numpy(np.concatenate(positions)).unsqueeze(0).to(self._device),
            past_key_values=batch.past_key_values,
            use_cache=False,
            logits_to_keep=keep,
            paged=batch,
        )
        self.gathered_bytes = batch.gathered_bytes
        logits: torch.Tensor = found.logits[0]
        return logits

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        self.memory.read(layer, pages, start, count, out)

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        self.memory.write(layer, pages, start, count, data)

    def measure(self) -> CostModel:
        chunks = [(n, p) for n, p in _MEASURED_CHUNKS if n <= self.limits.max_step_tokens and self._fits(1, n + p)]
        batches = [(b, c) for b, c in _MEASURED_BATCHES if b <= self.limits.max_batch and self._fits(b, c + 1)]
        self._time([(16, 0)])
        prefill = [(n, p, self._time([(n, p)])) for n, p in chunks]
        decode = [(b, b * c, self._time([(1, c)] * b)) for b, c in batches]
        return CostModel(fit_prefill(prefill), fit_decode(decode))

    def close(self) -> None:
        self._sequences.clear()

    def _fits(self, num_seqs: int, num_tokens: int) -> bool:
        pages = -(-num_tokens // self.limits.page_tokens)
        return num_tokens <= self.limits.max_context and num_seqs * pages <= self.limits.num_pages

    def _time(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Milliseconds of one step over (new, prefix) items; the best of two, as a busy neighbour only adds."""
        items: list[StepItem] = []
        first = 0
        for seq, (count, start) in enumerate(shapes, start=-len(shapes)):
            num_pages = -(-(start + count) // self.limits.page_tokens)
            self.add_sequence(seq, [1] * (start + count), start + count, SamplingParams(temperature=0.0), 0)
            items.append(StepItem(seq, start, count, np.arange(first, first + num_pages), sample=True))
            first += num_pages
        best = min(self.run(StepPlan(tuple(items)), None, {}).step_ns for _ in range(2)) / 1e6
        for item in items:
            self.remove_sequence(item.seq)
        return best
