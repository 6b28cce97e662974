"""The models that exactness is tested with, and what plain transformers make of a prompt."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mooncake.engine.models import resolve_model
from mooncake.frontend.tokenizer import Tokenizer
from tests.live.harness import MODEL

MAX_CONTEXT = 8192


def save_tiny_model(folder: Path, *, head_dim: int = 16) -> Path:
    """A random Llama of three layers under the real tokenizer: its weights are spread so that it has clear preferences and
    its output, token for token, depends on the whole context. head_dim: vLLM's kernels want 32 at least."""
    real = resolve_model(MODEL).path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real / name, folder / name)
    config = transformers.LlamaConfig(
        vocab_size=transformers.AutoConfig.from_pretrained(real).vocab_size,
        hidden_size=4 * head_dim,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Reference:
    """Plain transformers in float32."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # more would spin in the way of the cluster
        transformers.utils.logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self._tokenizer = Tokenizer.load(folder)

    def text(self, prompt: Sequence[int], num_tokens: int) -> str:
        """Greedy, without an end before num_tokens."""
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens)
        return self.decode(out[0, len(prompt) :].tolist())

    def decode(self, token_ids: Sequence[int]) -> str:
        detokenizer = self._tokenizer.detokenizer()
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
