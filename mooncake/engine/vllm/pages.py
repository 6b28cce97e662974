"""vLLM's KV memory as pages that can be copied (`PageAccess`).

A page of a layer is [kv_heads, page_tokens, 2 * head_dim], in this order in every object, however it lies in memory. Copies are
of whole pages: start and count are multiples of the page size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mooncake.core.errors import ConfigError
from mooncake.engine.base import KvLayout
from mooncake.engine.vllm.layout import KvShape


class KvPages:
    """On a GPU, copies go through a stream of their own, which first waits for what the compute stream had been given when
    `mark`, or `mark_loads`, was called."""

    def __init__(self, caches: Mapping[str, torch.Tensor], shape: KvShape) -> None:
        self.layers = {name: at for at, name in enumerate(caches)}
        self._caches = list(caches.values())
        self._page_tokens = shape.page_tokens
        for name, cache in caches.items():
            _check(name, cache, shape)
        token_bytes = shape.kv_heads * shape.head_elements * self._caches[0].itemsize
        self.layout = KvLayout(len(caches), token_bytes, shape.dtype, shape.name)
        self._page_bytes = token_bytes * shape.page_tokens
        on_cpu = self._caches[0].device.type == "cpu"
        self._bytes = [_as_bytes(cache) for cache in self._caches] if on_cpu else None
        self._stream = None if on_cpu else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._marks: dict[int, torch.cuda.Event] = {}
        self._loads_mark: torch.cuda.Event | None = None

    def mark(self, layer: int) -> None:
        """The compute stream has been given all work that fills this layer's pages in this step."""
        if self._stream is not None:
            event = self._marks[layer] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

    def mark_loads(self) -> None:
        """The compute stream has been given all work that used the pages that are now loaded."""
        if self._stream is not None:
            self._loads_mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._loads_mark.record()

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        target = np.frombuffer(out, dtype=np.uint8).reshape(-1, self._page_bytes)
        used = self._used(pages, start, count)
        if self._bytes is not None:
            for row, page in zip(target, used, strict=True):
                np.copyto(row, self._bytes[layer][page])
        else:
            np.copyto(target, self._read_device(layer, used).reshape(target.shape))

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        source = np.frombuffer(data, dtype=np.uint8).reshape(-1, self._page_bytes)
        used = self._used(pages, start, count)
        if self._bytes is not None:
            for row, page in zip(source, used, strict=True):
                np.copyto(self._bytes[layer][page], row)
        else:
            self._write_device(layer, used, source)

    def _used(self, pages: np.ndarray, start: int, count: int) -> np.ndarray:
        return pages[start // self._page_tokens : (start + count) // self._page_tokens]

    def _read_device(self, layer: int, used: np.ndarray) -> np.ndarray:
        cache = self._caches[layer]
        with torch.cuda.stream(self._stream):
            if layer in self._marks:
                self._marks[layer].wait(self._stream)
            gathered = cache.index_select(0, torch.from_numpy(used).to(cache.device)).contiguous()
            return gathered.view(torch.uint8).cpu().numpy()  # waits for the copy

    def _write_device(self, layer: int, used: np.ndarray, source: np.ndarray) -> None:
        cache = self._caches[layer]
        values = torch.from_numpy(source.copy()).view(cache.dtype).view(len(used), *cache.shape[1:])
        with torch.cuda.stream(self._stream):
            if self._loads_mark is not None:
                self._loads_mark.wait(self._stream)
            cache.index_copy_(0, torch.from_numpy(used).to(cache.device), values.to(cache.device))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()


def _check(name: str, cache: torch.Tensor, shape: KvShape) -> None:
    """Raises ConfigError: what we do not understand we do not copy."""
    wanted = (shape.kv_heads, shape.page_tokens, shape.head_elements)
    if tuple(cache.shape[1:]) != wanted or str(cache.dtype).removeprefix("torch.") != shape.dtype:
        raise ConfigError(
            f"KV cache of {name}: {cache.dtype}{list(cache.shape)}, expected {shape.dtype}[pages, {wanted[0]}, {wanted[1]}, "
            f"{wanted[2]}]"
        )


def _as_bytes(cache: torch.Tensor) -> np.ndarray:
    """[pages, bytes of a page]. Raises ConfigError if a page is not one run of bytes."""
    if not cache[0].is_contiguous():
        raise ConfigError(f"KV cache: strides {cache.stride()} of shape {list(cache.shape)}: a page is not contiguous")
    pages, page_elements = cache.shape[0], cache[0].numel()
    flat = torch.as_strided(cache, (pages, page_elements), (cache.stride(0), 1))
    return flat.view(torch.uint8).numpy()
