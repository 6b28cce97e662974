"""From configuration to a checked `TorchStepEngine`."""

from __future__ import annotations

from pathlib import Path

import torch

from mooncake.config import Config
from mooncake.core.errors import ConfigError
from mooncake.engine.base import EngineLimits
from mooncake.engine.build import engine_limits
from mooncake.engine.grammar import Grammars
from mooncake.engine.models import resolve_model
from mooncake.engine.torch.check import check_model
from mooncake.engine.torch.model import Dimensions, dimensions, load_model
from mooncake.engine.torch.step_engine import TorchStepEngine

_DEFAULT_KV_TOKENS = 16_384
_DEVICE_SHARE = 0.7
"""Of the GPU memory that is free after loading the model, for KV; the rest is for activations."""


def build_torch(config: Config, max_batch: int, num_threads: int) -> TorchStepEngine:
    """On the first GPU if there is one. Raises ModelError or ConfigError."""
    torch.set_num_threads(num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = resolve_model(config.model).path
    model = load_model(path, config.dtype, device)
    dims = dimensions(model)
    if config.max_context is not None and config.max_context > dims.max_context:
        raise ConfigError(f"max_context = {config.max_context}: the model's own limit is {dims.max_context}")
    token_bytes = dims.token_elements * model.dtype.itemsize
    limits = engine_limits(config, max_batch, dims.max_context, _default_kv_tokens(device, token_bytes))
    engine = TorchStepEngine(model, dims, limits, device, _grammars(path, dims))
    check_model(model, engine)
    return engine


def build_from_folder(path: Path, dtype: str, limits: EngineLimits, *, device: str = "cpu") -> TorchStepEngine:
    """For tests and benchmarks: no configuration needed."""
    model = load_model(path, dtype, device)
    dims = dimensions(model)
    engine = TorchStepEngine(model, dims, limits, device, _grammars(path, dims))
    check_model(model, engine)
    return engine


def _grammars(path: Path, dims: Dimensions) -> Grammars | None:
    """A model may be served without a tokenizer of ours, to clients that send token ids."""
    return Grammars.load(path, dims.vocab_size) if (path / "tokenizer.json").is_file() else None


def _default_kv_tokens(device: str, token_bytes: int) -> int:
    if device == "cpu":
        return _DEFAULT_KV_TOKENS
    free, _ = torch.cuda.mem_get_info()
    return int(free * _DEVICE_SHARE) // token_bytes
