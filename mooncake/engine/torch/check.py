"""Refuses, at load, models that the packed paged path would get wrong.

By what they ask of their attention (unknown keywords), by how often they call it (once per layer), by how they rotate
(position codes that depend on the longest sequence couple packed ones), and by comparing logits: two prompts, packed and in
chunks, against plain forwards of the same weights with the library's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mooncake.core.errors import ModelError
from mooncake.core.types import SamplingParams
from mooncake.engine.base import StepItem
from mooncake.engine.torch.attention import NAME, UnknownSemantics
from mooncake.engine.torch.batch import LayerWriter
from mooncake.engine.torch.step_engine import TorchStepEngine

_LENGTHS = (23, 40)
_CHUNKS = (16, 17)
"""Of the two prompts; the second chunk of each follows in a step with the other's."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Of the difference, relative to the spread of the logits. Packing a wrong way differs by the spread itself."""
_COUPLED_ROPE = ("dynamic", "longrope")


def check_model(model: Any, engine: TorchStepEngine) -> None:
    """Raises ModelError naming the model type and the reason."""
    kind = model.config.model_type
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in _COUPLED_ROPE:
        raise ModelError(f"model type {kind!r} is not supported: its {rope['rope_type']} RoPE couples packed sequences")
    prompts = _prompts(engine.vocab_size)
    try:
        packed = _packed_logits(engine, prompts)
    except UnknownSemantics as error:
        raise ModelError(f"model type {kind!r} is not supported: {error}") from None
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(f"model type {kind!r} is not supported: packed forward fails ({error})") from error
    plain = _plain_logits(model, prompts)
    spread = float(plain.std())
    difference = float((packed - plain).abs().max())
    if not difference <= _TOLERANCE[model.dtype] * max(spread, 1e-6) * 8:
        raise ModelError(
            f"model type {kind!r} is not supported: packed logits differ from plain ones by {difference:.3g} "
            f"where they spread by {spread:.3g}"
        )


def _prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).tolist() for length in _LENGTHS]


@torch.inference_mode()
def _packed_logits(engine: TorchStepEngine, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Logits at the end of each prompt, from pages that lie in reverse order, so that nothing is right by chance."""
    pages_each = -(-max(_LENGTHS) // engine.limits.page_tokens)
    pages = [np.arange(2 * pages_each)[::-1][at * pages_each : (at + 1) * pages_each].copy() for at in range(2)]
    sequences = (-1, -2)
    for seq, prompt in zip(sequences, prompts, strict=True):
        engine.add_sequence(seq, prompt, len(prompt), SamplingParams(), 0)
    starts = [0, 0]
    logits = torch.empty(0)
    for last in (False, True):
        ends = _LENGTHS if last else _CHUNKS
        items = [
            StepItem(seq, start, end - start, owned, sample=True)
            for seq, start, end, owned in zip(sequences, starts, ends, pages, strict=True)
        ]
        writer = LayerWriter(items, engine.memory, None, {})
        logits = engine.forward(items, writer).float().cpu()
        if sorted(writer.layers_seen) != list(range(engine.layout.num_layers)):
            raise UnknownSemantics("it does not call its attention once per layer")
        starts = list(ends)
    for seq in sequences:
        engine.remove_sequence(seq)
    return logits


@torch.inference_mode()
def _plain_logits(model: Any, prompts: Sequence[list[int]]) -> torch.Tensor:
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        rows = [
            model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0, -1].float().cpu()
            for prompt in prompts
        ]
    finally:
        model.set_attn_implementation(NAME)
    return torch.stack(rows)
