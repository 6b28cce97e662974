"""Machines and models to plan with (FACTS section 3): what a node of eight GPUs computes, holds, moves and costs.

Time models are those of LLaMA-3.1-70B in bf16 with tensor parallelism over the eight GPUs, so that model is the only one here.
Bandwidths are what one gets, not what is printed on the part: a NIC's measured rate where there is one, elsewhere the lower
of the two measured shares of the raw rate; of PCIe half, as on the paper's node.
"""

from __future__ import annotations

import msgspec

from mooncake.core.types import CostModel
from mooncake.engine.simulated import HARDWARE

NIC_SHARE = 0.475
"""190 of 400 GB/s with 8x400 Gbps; it was 87 of 100 with 4x200."""
PCIE_SHARE = 0.5
"""128 of 256 GB/s on the paper's node."""
HBM_SHARE = 0.9
"""Of GPU memory that weights and KV may fill; the rest is for activations."""
NUM_GPUS = 8


class Hardware(msgspec.Struct, frozen=True):
    """One node, all GPUs together. usd_per_gpu_hour: a list price, to be replaced by one's own."""

    name: str
    cost: CostModel
    hbm_bytes: int
    dram_bytes: int
    host_bytes_per_s: float
    """Between DRAM and GPUs."""
    nic_bytes_per_s: float
    usd_per_gpu_hour: float
    ssd_bytes_per_s: float
    """Of the SSD tier, if the node is given one: reads and writes together."""
    num_gpus: int = NUM_GPUS


class ModelShape(msgspec.Struct, frozen=True):
    name: str
    kv_token_bytes: int
    weight_bytes: int


def _node(name: str, times: str, gpu_gb: int, nic_gb: float, pcie_gb: float, usd: float) -> Hardware:
    """gpu_gb, pcie_gb: of one GPU; nic_gb: of the node, as measured."""
    pcie = NUM_GPUS * pcie_gb * PCIE_SHARE * 1e9
    return Hardware(
        name, HARDWARE[times], NUM_GPUS * gpu_gb * 10**9, DRAM_BYTES, pcie, nic_gb * 1e9, usd, SSD_BYTES_PER_S
    )


DRAM_BYTES = 3_000_000 * 327_680
"""Three million tokens of LLaMA3-70B: the paper's 1 TB, and as much on every other node unless told otherwise."""

SSD_BYTES_PER_S = 6e9
"""One fast NVMe drive, on every node; the paper says nothing of its own."""

HARDWARES = {
    node.name: node
    for node in (
        _node("a800x8", "a800-paper", 80, 87.0, 32, 3.50),
        _node("a100x8", "a100", 80, NUM_GPUS * 25 * NIC_SHARE, 32, 3.50),
        _node("h100x8", "h100", 80, 190.0, 64, 4.50),
        _node("h200x8", "h200", 141, 190.0, 64, 5.75),
        _node("b200x8", "b200", 180, NUM_GPUS * 100 * NIC_SHARE, 128, 7.25),
    )
}
"""a800x8 is the paper's node, with 4x200 Gbps; the others have a NIC per GPU."""

MODELS = {"llama3-70b": ModelShape("llama3-70b", kv_token_bytes=327_680, weight_bytes=141_107_412_992)}
"""80 layers, 8 KV heads of 128, 2 bytes, K and V; 70,553,706,496 parameters of 2 bytes."""

USD_PER_GPU_HOUR = {"a800-paper": 3.50, "a100": 3.50, "h100": 4.50, "h200": 5.75, "b200": 7.25}
"""By the time models' names in a configuration file."""


def kv_tokens(hardware: Hardware, model: ModelShape) -> int:
    """Tokens of KV that fit beside the weights."""
    return int(hardware.hbm_bytes * HBM_SHARE - model.weight_bytes) // model.kv_token_bytes
