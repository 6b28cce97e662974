"""Loads a model and finds out what its KV looks like."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as functional
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mooncake.core.errors import ModelError
from mooncake.engine.models import model_config
from mooncake.engine.torch.attention import NAME, paged_attention

SUPPORTED_TRANSFORMERS = "5.23."
"""The attention interface is internal to transformers, so the version is pinned."""


class Dimensions(msgspec.Struct, frozen=True):
    """token_shape: of one token's KV in one layer. layout: its name, see `KvLayout`. latent: whether it is what keys and values
    are expanded from (multi-head latent attention)."""

    num_layers: int
    token_shape: tuple[int, ...]
    layout: str
    latent: bool
    vocab_size: int
    max_context: int

    @property
    def token_elements(self) -> int:
        """Of all layers together."""
        return self.num_layers * math.prod(self.token_shape)


def load_model(path: Path, dtype: str, device: str) -> Any:
    """The model in evaluation mode, with our attention. Raises ModelError."""
    if not transformers.__version__.startswith(SUPPORTED_TRANSFORMERS):
        raise ModelError(
            f"transformers {transformers.__version__} is installed; this engine is made for {SUPPORTED_TRANSFORMERS}*"
        )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=NAME, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, KeyError) and NAME in error.args:
            kind = model_config(path).get("model_type")
            raise ModelError(f"model type {kind!r} is not supported: its attention cannot be replaced") from error
        raise ModelError(f"cannot load the model in {path}: {error}") from error
    model = model.to(device).eval()
    if device == "cpu" and model.dtype == torch.bfloat16:
        use_row_kernel(model, row_kernel_is_faster)
    return model


class RowLinear(torch.nn.Linear):
    """One row times a matrix through `mv`: the CPU's matrix kernel for bfloat16 lays the weights out anew for every call, which
    takes up to half as long again (torch 2.13, measured)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (the name it overrides)
        if input.numel() != self.in_features:
            return super().forward(input)
        row = input.reshape(-1)
        bias: torch.Tensor | None = self._parameters["bias"]
        found = torch.mv(self.weight, row) if bias is None else torch.addmv(bias, self.weight, row)
        return found.view(*input.shape[:-1], self.out_features)


def use_row_kernel(model: Any, is_faster: Callable[[torch.Tensor], bool]) -> None:
    """For the shapes of weights for which it is."""
    chosen: dict[torch.Size, bool] = {}
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            shape = module.weight.shape
            if shape not in chosen:
                chosen[shape] = is_faster(module.weight)
            if chosen[shape]:
                module.__class__ = RowLinear


_ROW_TRIALS = 7


@torch.inference_mode()
def row_kernel_is_faster(weight: torch.Tensor) -> bool:
    """Which one is depends on processor and threads. The best of some trials each, as a busy neighbour only adds."""
    row = torch.ones(weight.shape[1], dtype=weight.dtype)
    by_row: list[float] = []
    by_matrix: list[float] = []
    for _ in range(_ROW_TRIALS):
        began = time.perf_counter()
        torch.mv(weight, row)
        between = time.perf_counter()
        functional.linear(row[None], weight)
        by_row.append(between - began)
        by_matrix.append(time.perf_counter() - between)
    return min(by_row) < min(by_matrix)


def dimensions(model: Any) -> Dimensions:
    """Raises ModelError for a configuration without the usual words."""
    config = model.config.get_text_config()
    latent = getattr(config, "kv_lora_rank", None)
    try:
        if latent:
            rope: int = config.qk_rope_head_dim
            shape: tuple[int, ...] = (latent + rope,)
            layout = f"mla.{latent}+{rope}"
        else:
            num_heads = config.num_attention_heads
            num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
            shape = (2, num_kv_heads, getattr(config, "head_dim", None) or config.hidden_size // num_heads)
            layout = f"kv.{shape[1]}x{shape[2]}"
        return Dimensions(
            num_layers=config.num_hidden_layers,
            token_shape=shape,
            layout=layout,
            latent=bool(latent),
            vocab_size=config.vocab_size,
            max_context=config.max_position_embeddings,
        )
    except AttributeError as error:
        raise ModelError(f"model type {config.model_type!r} is not supported: {error}") from error
