"""Makes a safetensors folder, with tokenizer and generation config, from a GGUF file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from mooncake.core.errors import ModelError

_KEPT_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise to bfloat16. Raises ModelError if transformers cannot read the file."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **where)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **where)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot read {source}: {error}") from error
    # What is left of the quantisation makes saving fail, though the weights are plain by now.
    if getattr(model, "hf_quantizer", None) is not None:
        del model.hf_quantizer
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _name_end_of_sequence(target, tokenizer)


def _name_end_of_sequence(target: Path, tokenizer: Any) -> None:
    """GGUF files often leave generation_config.json without an end-of-sequence id; the tokenizer knows it."""
    path = target / "generation_config.json"
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    kept = {key: found[key] for key in _KEPT_GENERATION_KEYS if found.get(key) is not None}
    kept.setdefault("eos_token_id", tokenizer.eos_token_id)
    path.write_text(json.dumps(kept, indent=2) + "\n")
