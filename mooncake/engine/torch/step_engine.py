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
from mooncake.engine.grammar import Grammars, Matcher
from mooncake.engine.torch.attention import RunningStep
from mooncake.engine.torch.batch import HeadsBatch, LatentBatch, LayerWriter
from mooncake.engine.torch.model import Dimensions
from mooncake.engine.torch.pages import PageMemory, layout_of
from mooncake.engine.torch.sampling import SequenceState, draw_tokens

_MEASURED_TOKENS_MAX = 512
"""Calibration uses chunks and contexts up to this or to what the engine takes, and these shares of it."""
_MEASURED_CHUNKS = ((1 / 8, 0), (1 / 2, 0), (1 / 2, 1 / 2), (1, 0), (1 / 2, 3 / 2))
"""(new, prefix) tokens of the prefill steps."""
_MEASURED_BATCHES = ((1, 1 / 8), (1, 1), (4, 1 / 2), (8, 1 / 8))
"""(sequences, context of each) of the decode steps."""


class TorchStepEngine:
    """model: loaded by `load_model`. grammars: None if its tokens are not known. See `StepEngine`."""

    def __init__(
        self, model: Any, dims: Dimensions, limits: EngineLimits, device: str, grammars: Grammars | None = None
    ) -> None:
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
        self._running = RunningStep(model)
        self._device = device
        self._grammars = grammars
        self._sequences: dict[int, SequenceState] = {}

    def add_sequence(
        self,
        seq: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        choice: int,
        num_choices: int = 1,
    ) -> None:
        matcher = self._matcher(sampling.grammar) if sampling.grammar else None
        self._sequences[seq] = SequenceState(token_ids, num_prompt_tokens, sampling, choice, num_choices, matcher)

    def remove_sequence(self, seq: int) -> None:
        self._sequences.pop(seq, None)

    @torch.inference_mode()
    def run(self, plan: StepPlan, after_layer: LayerHook | None, loads: Mapping[int, LayerLoad]) -> StepResult:
        began = time.monotonic_ns()
        writer = LayerWriter(plan.items, self.memory, after_layer, loads)
        together = after_layer is None
        logits = self.forward(plan.items, writer, together=together)
        if together and _sick(logits).any():
            # Some sequence's KV is sick, and others may have caught it; apart, each has only its own.
            logits = self.forward(plan.items, LayerWriter(plan.items, self.memory, None, {}), together=False)
        sampled = [item for item in plan.items if item.sample]
        sick = {item.seq for item, is_sick in zip(sampled, _sick(logits).tolist(), strict=True) if is_sick}
        failed = tuple(item.seq for item in plan.items if item.seq in writer.failed or item.seq in sick)
        drawn: dict[int, tuple[int, ...]] = {}
        logprobs: dict[int, Any] = {}
        if sampled:
            sequences = [self._sequences[item.seq] for item in sampled]
            tokens, found = draw_tokens(logits, sequences)
            for item, choices, logprob in zip(sampled, tokens, found, strict=True):
                drawn[item.seq], logprobs[item.seq] = choices, logprob
                if item.seq not in failed:
                    self._sequences[item.seq].append(choices[0])  # a joint sequence never computes it
        return StepResult(
            tokens=tuple(drawn.get(item.seq, ()) for item in plan.items),
            logprobs=tuple(logprobs.get(item.seq, ()) for item in plan.items),
            failed=failed,
            step_ns=time.monotonic_ns() - began,
            lost=tuple((item.seq, fault) for item in plan.items if (fault := self._sequences[item.seq].fault)),
        )

    def forward(self, items: Sequence[StepItem], writer: LayerWriter, *, together: bool = True) -> torch.Tensor:
        """Logits of the items that sample, [sampled, vocabulary]. together: whether sequences may share an attention call."""
        batch = self._batch(items, self.memory, writer, together)
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        last: list[int] = []
        for item in items:
            tokens.extend(self._sequences[item.seq].token_ids[item.start : item.start + item.count])
            positions.append(np.arange(item.start, item.start + item.count))
            if item.sample:
                last.append(len(tokens) - 1)
        keep = torch.tensor(last, dtype=torch.long, device=self._device)
        self._running.step = batch
        found = self._model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.from_numpy(np.concatenate(positions)).unsqueeze(0).to(self._device),
            past_key_values=batch.past_key_values,
            use_cache=False,
            logits_to_keep=keep,
        )
        self.gathered_bytes = batch.gathered_bytes
        logits: torch.Tensor = found.logits[0]
        return logits

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        self.memory.read(layer, pages, start, count, out)

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        self.memory.write(layer, pages, start, count, data)

    def measure(self) -> CostModel:
        whole = min(_MEASURED_TOKENS_MAX, self.limits.max_step_tokens, self.limits.max_context - 1)
        chunks = [(int(n * whole), int(p * whole)) for n, p in _MEASURED_CHUNKS]
        batches = [(b, int(c * whole)) for b, c in _MEASURED_BATCHES if b <= self.limits.max_batch]
        self._time(chunks[:1])
        prefill = [(n, p, self._time([(n, p)])) for n, p in chunks if self._fits(1, n + p)]
        decode = [(b, b * c, self._time([(1, c)] * b)) for b, c in batches if self._fits(b, c + 1)]
        return CostModel(fit_prefill(prefill), fit_decode(decode))

    def close(self) -> None:
        self._sequences.clear()

    def _matcher(self, grammar: str) -> Matcher:
        if self._grammars is None:
            return Matcher(None, self.vocab_size, "the model folder has no tokenizer, which a grammar needs")
        return self._grammars.matcher(grammar)

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


def _sick(logits: torch.Tensor) -> torch.Tensor:
    """Rows with a NaN: it spreads through every layer and the head's sums, so one column shows it. Bool, [sampled]."""
    return torch.isnan(logits[:, 0])
