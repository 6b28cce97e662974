"""The one set of parameters behind all figures of `mooncake reproduce fast25`. No figure has one of its own: what varies
within a figure (pool sizes, bandwidth, policy, load) is what that figure varies in the paper."""

from __future__ import annotations

import msgspec


class Parameters(msgspec.Struct, frozen=True):
    hardware: str = "a800x8"
    model: str = "llama3-70b"
    num_nodes: int = 16
    prefill: int = 8
    block_tokens: int = 512
    store_tokens: int = 3_000_000
    """Of a node's DRAM."""
    eviction: str = "lru"
    """As the paper has it; ours is another."""
    mooncake: str = "algorithm1"
    joint: str = "joint"
    """Ours, shown beside it."""
    vllm_router: str = "round_robin"
    strong_router: str = "local_cache_aware"
    vllm_chunk_tokens: int = 512
    jitter: str = "auto"
    seed: int = 0
    ttft_slo_s: float = 30.0
    tbt_slos_s: tuple[float, ...] = (0.1, 0.2, 0.3)
    fig1_speeds: tuple[float, ...] = (2.0,)
    fig5_speeds: tuple[float, ...] = (0.8, 1.0, 1.2)
    fig10_prefill: int = 10
    fig13_gbps: tuple[float, ...] = (10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
    fig13_assumed_gbps: float = 87 * 8.0
    """The paper's network, for a Conductor that is not told of a slower one."""
    fig15_prefill: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11)
    fig15_ttft_slo_s: float = 10.0
    fig15_tbt_slo_s: float = 0.1
    overload_speed: float = 2.0
    overload_tbt_slos_s: tuple[float, ...] = (0.1, 0.021)
    """By the second one decode is full at that load."""
    large_cache_tokens: int = 50_000_000
    quick_requests: int = 2_000


PARAMETERS = Parameters()


def assumptions(parameters: Parameters) -> list[str]:
    """What the paper leaves open, and what was taken."""
    p = parameters
    decode = p.num_nodes - p.prefill
    split = (
        f"{p.prefill} prefill and {decode} decode unless the figure says otherwise; the paper does not give its split"
    )
    spread = "requests are spread over it in their order; elsewhere they stay as they are"
    steps = f"whole prompts in one step, or chunks of {p.vllm_chunk_tokens} tokens"
    return [
        f"cluster: {p.num_nodes} nodes of {p.hardware}, {split}",
        "prefill time: fit of the paper's Fig 14 (a800-paper); decode time: that of 8xA100, as the paper gives none",
        f"blocks of {p.block_tokens} tokens, as the traces have them; the paper's store has 256",
        f"a node's store holds {p.store_tokens:,} tokens, eviction {p.eviction}; KV in GPU memory is a cache before it",
        "network 87 GB/s and host to GPU 128 GB/s per node, as measured in the paper; hops of control messages 0.3 ms",
        f"timestamps: --jitter {p.jitter}: where the trace's clock has a step (conversation: 3 s), {spread}",
        f"Mooncake is policy {p.mooncake}, threshold 2 (unpublished; results hardly change between 1 and 4); {p.joint} is ours",
        f"vLLM: {p.num_nodes} colocated instances behind a {p.vllm_router} router; {steps}",
        "vLLM: prefix caching in GPU memory, or none; no overhead of its host is modelled",
        f"strong baseline: the same instances behind a {p.strong_router} router",
        "a decode instance loads KV chunk by chunk while the rest is prefilled; the last chunk when all of it is in the store",
        f"objectives: TTFT {p.ttft_slo_s:g} s, fig 15 {p.fig15_ttft_slo_s:g} s; nothing is refused but in the overload table",
        f"overload: TBT {1000 * p.overload_tbt_slos_s[0]:g} ms (unpublished), {p.overload_speed:g} times the speed",
        f"no warm-up is taken off; contexts are bounded by KV room alone; seed {p.seed}",
    ]
