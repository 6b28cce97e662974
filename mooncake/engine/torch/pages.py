"""The memory of the page pool: one tensor per layer, token after token, so that a run of pages is one range of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mooncake.engine.base import KvLayout


class PageMemory:
    """kv[layer]: [slots, *token_shape], where slot = page * page_tokens + offset. All of it is touched at construction, since
    the first touch of a page costs ten times a copy.

    `read` and `write` may run in copy threads, for tokens that no running step writes. On a GPU they go through their own
    stream, which first waits for what the compute stream had been given when `mark` was called."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        page_tokens: int,
        token_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.kv = torch.empty((num_layers, num_slots, *token_shape), dtype=dtype, device=device).fill_(0)
        self.page_tokens = page_tokens
        self._bytes = None if device != "cpu" else self.kv.view(num_layers, num_slots, -1).view(torch.uint8).numpy()
        self._token_bytes = self.kv[0, 0].nbytes
        self._stream = torch.cuda.Stream() if device != "cpu" else None  # type: ignore[no-untyped-call]
        self._marks: dict[int, torch.cuda.Event] = {}

    def mark(self, layer: int) -> None:
        """The compute stream has been given all work that fills this layer's pages in this step."""
        if self._stream is not None:
            event = self._marks[layer] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

    def read(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        target = np.frombuffer(out, dtype=np.uint8).reshape(count, self._token_bytes)
        for slot, at, length in runs(pages, self.page_tokens, start, count):
            if self._bytes is not None:
                np.copyto(target[at : at + length], self._bytes[layer, slot : slot + length])
            else:
                self._read_device(layer, slot, target[at : at + length])

    def write(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        source = np.frombuffer(data, dtype=np.uint8).reshape(count, self._token_bytes)
        for slot, at, length in runs(pages, self.page_tokens, start, count):
            if self._bytes is not None:
                np.copyto(self._bytes[layer, slot : slot + length], source[at : at + length])
            else:
                self._write_device(layer, slot, source[at : at + length])

    def _read_device(self, layer: int, slot: int, target: np.ndarray) -> None:
        staging = torch.empty(target.shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            if layer in self._marks:
                self._marks[layer].wait(self._stream)
            staging.copy_(self._device_bytes(layer, slot, len(target)), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()
        np.copyto(target, staging.numpy())

    def _write_device(self, layer: int, slot: int, source: np.ndarray) -> None:
        staging = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(staging.numpy(), source)
        with torch.cuda.stream(self._stream):
            self._device_bytes(layer, slot, len(source)).copy_(staging, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()

    def _device_bytes(self, layer: int, slot: int, count: int) -> torch.Tensor:
        return self.kv[layer, slot : slot + count].view(count, -1).view(torch.uint8)


def layout_of(memory: PageMemory, name: str) -> KvLayout:
    dtype = str(memory.kv.dtype).removeprefix("torch.")
    return KvLayout(memory.kv.shape[0], memory.kv[0, 0].nbytes, dtype, name)


def runs(pages: np.ndarray, page_tokens: int, start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Contiguous pieces of tokens [start, start + count): (first slot, offset from start, length). Adjacent pages merge."""
    first, last = start // page_tokens, (start + count - 1) // page_tokens
    used = pages[first : last + 1]
    breaks = np.flatnonzero(np.diff(used) != 1) + 1
    at = 0
    for begin, end in zip((0, *breaks), (*breaks, len(used)), strict=True):
        skip = start - first * page_tokens if begin == 0 else 0
        length = min((int(end) - int(begin)) * page_tokens - skip, count - at)
        yield int(used[begin]) * page_tokens + skip, at, length
        at += length


def first_slot(pages: np.ndarray, page_tokens: int, num_tokens: int) -> int | None:
    """Where the sequence starts if its first num_tokens tokens lie in one run, else None."""
    used = pages[: -(-num_tokens // page_tokens)]
    if used[-1] - used[0] != len(used) - 1 or np.any(np.diff(used) != 1):
        return None
    return int(used[0]) * page_tokens


def slots(pages: np.ndarray, page_tokens: int, start: int, count: int) -> np.ndarray:
    positions = np.arange(start, start + count)
    return pages[positions // page_tokens] * page_tokens + positions % page_tokens
