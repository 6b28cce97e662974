"""The shape of KV: how vLLM's pages make up the store's objects.

vLLM calls its pages blocks; here they are pages, and a block is the store's unit of reuse. A block is a whole number of pages:

    object of a block:  [layer][page of the block][kv_heads, page_tokens, 2 * head_dim]        one copy per layer and page
    tail:               the same with the pages that the tokens after the last full block take, whole pages always

Each worker stores its own share of heads and layers, so objects are named by its ranks and by how many there are of each.
"""

from __future__ import annotations

import msgspec

from mooncake.core.errors import ConfigError
from mooncake.core.keys import shard_id


class Geometry(msgspec.Struct, frozen=True):
    page_tokens: int
    block_tokens: int

    def whole_pages(self, num_tokens: int) -> int:
        """Up to the end of the page."""
        return -(-num_tokens // self.page_tokens) * self.page_tokens

    def full_blocks(self, num_tokens: int) -> int:
        return num_tokens // self.block_tokens

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)


def geometry(page_tokens: int, block_tokens: int) -> Geometry:
    """Raises ConfigError, unless a block is a whole number of pages."""
    if block_tokens % page_tokens:
        raise ConfigError(
            f"block_tokens = {block_tokens}: must be a multiple of vLLM's block_size, which is {page_tokens} here"
        )
    return Geometry(page_tokens, block_tokens)


class KvShape(msgspec.Struct, frozen=True):
    """What engines that share KV must have in common, beside the model. tp, pp: sizes of tensor and pipeline parallelism."""

    dtype: str
    kv_heads: int
    head_elements: int
    """Of one token and head: K and V together, 2 * head_dim."""
    page_tokens: int
    block_tokens: int
    layers: int
    """Of the whole model."""
    token_bytes: int
    """Of one token and layer, in all workers together."""
    tp: int = 1
    pp: int = 1

    @property
    def worker_token_bytes(self) -> int:
        """Of one token, in all layers of one worker."""
        return max(1, self.token_bytes * self.layers // (self.tp * self.pp))

    @property
    def name(self) -> str:
        """Readable on purpose: a mismatch is reported with both."""
        return (
            f"vllm.{self.kv_heads}x{self.head_elements}/page={self.page_tokens}/block={self.block_tokens}"
            f"/tensor_parallel_size={self.tp}/pipeline_parallel_size={self.pp}/dtype={self.dtype}"
        )

    def shard(self, tp_rank: int, pp_rank: int) -> bytes:
        return shard_id(self.dtype, self.name, tp_rank, self.tp, pp_rank, self.pp)

    def shards(self) -> tuple[bytes, ...]:
        """Of all workers."""
        return tuple(self.shard(tp_rank, pp_rank) for pp_rank in range(self.pp) for tp_rank in range(self.tp))
