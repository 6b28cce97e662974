"""Copies of hot prefixes before they are asked for. Placement copies too, by pulling; but each pull is waited for.

A prefix is named by its last reused block. Its uses are counted, decaying by half in each half-life, and only for as many
prefixes as the table holds: a newcomer takes the place of the least used, and starts from its count. One that is
hot, and whose holders have more to send than they can, is copied to a store node that does not have it: the one with
the least booked on its NIC. It then rests until the copy must have arrived.
"""

from __future__ import annotations

import math

import msgspec

from mooncake.scheduler.config import ConductorConfig, ReplicationConfig
from mooncake.scheduler.costs import BlockCosts
from mooncake.scheduler.placement import Decision
from mooncake.scheduler.prefix_index import ANY, level_bit
from mooncake.scheduler.view import View


class Replicate(msgspec.Struct, frozen=True):
    """Copy these blocks from one store node to another."""

    block_keys: tuple[bytes, ...]
    source: str
    target: str


class _Prefix(msgspec.Struct):
    """num_uses: as of used_at."""

    num_uses: float
    used_at: int
    rests_until: int = 0


class HotPrefixes:
    def __init__(self, config: ReplicationConfig, view: View, costs: BlockCosts) -> None:
        self._config = config
        self._view = view
        self._costs = costs
        self._prefixes: dict[bytes, _Prefix] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def used(self, block_keys: tuple[bytes, ...], decision: Decision, now: int) -> Replicate | None:
        if decision.offers is None:
            return None
        num_blocks, holders = decision.offers.prices.match.longest(self._view.node_bits)
        if num_blocks < self._config.num_blocks_min:
            return None
        prefix = self._count(block_keys[num_blocks - 1], now)
        if prefix.num_uses < self._config.num_uses_min or prefix.rests_until > now:
            return None
        source = self._view.names[decision.source] if decision.source else ""
        if not source or not self._is_overloaded(prefix, num_blocks, holders.bit_count(), decision.source, now):
            return None
        target = self._find_target(holders, now)
        if target is None:
            return None
        prefix.rests_until = now + int(2 * num_blocks * self._costs.nic_ns) + self._config.rest_ns
        return Replicate(block_keys[:num_blocks], source, target)

    def _count(self, key: bytes, now: int) -> _Prefix:
        prefix = self._prefixes.get(key)
        if prefix is None:
            inherited = self._make_room(now)
            prefix = self._prefixes[key] = _Prefix(inherited, now)
        prefix.num_uses = self._left(prefix, now) + 1.0
        prefix.used_at = now
        return prefix

    def _make_room(self, now: int) -> float:
        if len(self._prefixes) < self._config.num_prefixes_max:
            return 0.0
        least = min(self._prefixes, key=lambda key: self._left(self._prefixes[key], now))
        return self._left(self._prefixes.pop(least), now)

    def _left(self, prefix: _Prefix, now: int) -> float:
        return prefix.num_uses * math.exp2((prefix.used_at - now) / self._config.half_life_ns)

    def _is_overloaded(self, prefix: _Prefix, num_blocks: int, num_holders: int, source: int, now: int) -> bool:
        """Whether the source's NIC is behind, or what this prefix alone asks of each holder is more than its part of a NIC."""
        if self._view.links.out_until[source] - now > self._config.wait_ns:
            return True
        per_holder_ns = prefix.num_uses * num_blocks * self._costs.nic_ns / max(1, num_holders)
        return per_holder_ns > self._config.nic_share * self._config.half_life_ns

    def _find_target(self, holders: int, now: int) -> str | None:
        """None if everybody has it."""
        links, free = self._view.links, []
        for name, node in self._view.nodes.items():
            if node.connected and not holders & level_bit(node.slot, ANY):
                booked = max(links.in_until[node.slot], links.out_until[node.slot], now)
                free.append((booked, node.slot, name))
        return min(free)[2] if free else None


def make_replication(config: ConductorConfig, view: View, costs: BlockCosts) -> HotPrefixes | None:
    """None if hot prefixes are not to be copied."""
    return HotPrefixes(config.replication, view, costs) if config.replicate else None
