"""The directory, decided: who is there, what they hold, what is missing, and who should copy what.

    node:    register ──▶ asked for a snapshot of each tier ──▶ known; then deltas, numbered without a gap
                               ▲                                  │ a gap, or deltas of another epoch
                               └──────────────────────────────────┘

All of it is soft: a directory that starts anew knows nothing, and says *unknown* where it would say *missing*, until those
nodes that registered have told all, or `settle_ns` have passed. Nodes register again by themselves.

Objects can be wanted more often than once (`Want`). Where fewer replicas are left, a node without one is asked to copy it from
one that has it; again after `retry_ns`, elsewhere if possible, as long as it is wanted and there is one. Reports tell what came
of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec

from mooncake.core.messages import NodeInfo
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S, Tier
from mooncake.store.directory.holders import NOBODY, Holder, Holders

REPLICAS_MAX = 16
WANTED_MAX = 4_000_000
"""Keys that are wanted more often than once; a row in a dictionary each."""
CHECK_KEYS = 10_000
"""Wanted keys that are looked at in one step."""
COPY_KEYS = 256
"""Of one wish to a node."""
TIERS = (Tier.DRAM, Tier.SSD)


class DirectoryConfig(msgspec.Struct, frozen=True):
    settle_ns: int = 3 * NANOS_PER_S
    """From the start, and for each node from its registration."""
    retry_ns: int = 2 * NANOS_PER_S
    usage_ns: int = 50 * NANOS_PER_MS
    """What tenants use is gathered so long before nodes are told."""
    step_ns: int = 5 * NANOS_PER_MS
    """Between steps of work that is done by and by."""


# ---------------------------------------------------------------- events


class Registered(msgspec.Struct, frozen=True, tag=True):
    """A node said who it is. peer: the number of its connection, which is never used again."""

    peer: int
    info: NodeInfo


class Gone(msgspec.Struct, frozen=True, tag=True):
    """A connection ended."""

    peer: int


class Changed(msgspec.Struct, frozen=True, tag=True):
    """What a node's tier gained and lost; seq grows by one with each."""

    peer: int
    tier: Tier
    seq: int
    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class Told(msgspec.Struct, frozen=True, tag=True):
    """A part of all that a node's tier holds as of seq; the last part has is_last."""

    peer: int
    tier: Tier
    seq: int
    keys: tuple[bytes, ...]
    is_first: bool
    is_last: bool


class Uses(msgspec.Struct, frozen=True, tag=True):
    """What tenants that have a quota use of a node's memory, in bytes."""

    peer: int
    usage: dict[str, int]


class Find(msgspec.Struct, frozen=True, tag=True):
    """Answered by Found."""

    peer: int
    request_id: int
    keys: tuple[bytes, ...]


class Want(msgspec.Struct, frozen=True, tag=True):
    """These should have so many replicas, on different nodes, as long as they have any; 1: no more than there are. Answered by
    Found."""

    peer: int
    request_id: int
    keys: tuple[bytes, ...]
    num_replicas: int


class Tick(msgspec.Struct, frozen=True, tag=True):
    """The deadline passed."""


DirectoryEvent = Registered | Gone | Changed | Told | Uses | Find | Want | Tick

# ---------------------------------------------------------------- commands


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """Ask the node for all that it has, in every tier."""

    peer: int


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Ask the node to copy these from another, if it has room."""

    peer: int
    source: NodeInfo
    keys: tuple[bytes, ...]


class Elsewhere(msgspec.Struct, frozen=True, tag=True):
    """Tell the node what tenants use of the others' memory."""

    peer: int
    usage: dict[str, int]


class Found(msgspec.Struct, frozen=True, tag=True):
    """By key, a number: 0 for a miss, and others of `sets`. unknown: there may be replicas that nobody has told of yet."""

    peer: int
    request_id: int
    numbers: list[int]
    sets: dict[int, tuple[Holder, ...]]
    nodes: dict[int, NodeInfo]
    unknown: bool


DirectoryCommand = Snapshot | Copy | Elsewhere | Found

# ---------------------------------------------------------------- the core


class _Node:
    """seqs: by tier, that of the last report, None until a snapshot is there. usage: by tenant; elsewhere: what it was told."""

    def __init__(self, peer: int, info: NodeInfo, until: int) -> None:
        self.peer = peer
        self.info = info
        self.until = until
        self.seqs: dict[Tier, int | None] = dict.fromkeys(TIERS)
        self.usage: dict[str, int] = {}
        self.elsewhere: dict[str, int] = {}
        self.missing: dict[Tier, set[bytes]] = {}
        """Of a snapshot that is being told: what we believe the tier has and was not named yet."""

    @property
    def is_known(self) -> bool:
        return None not in self.seqs.values()


class DirectoryCore:
    """Sans-IO: `handle(event, now) -> commands`, `deadline()`."""

    def __init__(self, config: DirectoryConfig, now: int) -> None:
        self.holders = Holders()
        self._config = config
        self._settled_at = now + config.settle_ns
        self._nodes: dict[int, _Node] = {}
        self._wanted: dict[bytes, int] = {}
        self._short: dict[bytes, int] = {}
        """Keys with fewer replicas than wanted, and when to ask for the next one; earliest first."""
        self._to_check: Iterator[bytes] | None = None
        self._next_step: int | None = None
        self._usage_at: int | None = None
        """When to tell nodes what tenants use elsewhere."""
        self.counters = dict.fromkeys(("gaps", "copies_asked", "unknown", "lookups", "reported"), 0)
        self._handlers: dict[type, Callable[[Any, int], list[DirectoryCommand]]] = {
            Registered: self._registered,
            Gone: self._gone,
            Changed: self._changed,
            Told: self._told,
            Uses: self._uses,
            Find: self._find,
            Want: self._want,
            Tick: lambda event, now: [],
        }

    def handle(self, event: DirectoryEvent, now: int) -> list[DirectoryCommand]:
        commands = self._handlers[type(event)](event, now)
        if self._next_step is not None and self._next_step <= now:
            self._next_step = None
            commands += self._step(now)
        if self._next_step is None and (self.holders.sweeping or self._to_check is not None):
            self._next_step = now + self._config.step_ns
        elif self._next_step is None and self._short:
            self._next_step = max(now + self._config.step_ns, next(iter(self._short.values())))
        if self._usage_at is not None and self._usage_at <= now:
            self._usage_at = None
            commands += self._tell_usage()
        return commands

    def deadline(self) -> int | None:
        return min([at for at in (self._next_step, self._usage_at) if at is not None], default=None)

    @property
    def nodes(self) -> list[NodeInfo]:
        return [node.info for node in self._nodes.values()]

    def metrics(self) -> dict[str, int]:
        return self.counters | {
            "nodes": len(self._nodes),
            "objects": len(self.holders),
            "wanted": len(self._wanted),
            "short": len(self._short),
        }

    # ------------------------------------------------------------ nodes

    def _registered(self, event: Registered, now: int) -> list[DirectoryCommand]:
        commands: list[DirectoryCommand] = []
        for node in [node for node in self._nodes.values() if node.info.name == event.info.name]:
            commands += self._forget(node)  # an older life, or connection, whose end we have not seen
        self._nodes[event.peer] = _Node(event.peer, event.info, now + self._config.settle_ns)
        self._usage_changed(now)
        return [*commands, Snapshot(event.peer)]

    def _gone(self, event: Gone, now: int) -> list[DirectoryCommand]:
        node = self._nodes.get(event.peer)
        if node is None:
            return []
        self._usage_changed(now)
        return self._forget(node)

    def _forget(self, node: _Node) -> list[DirectoryCommand]:
        del self._nodes[node.peer]
        self.holders.bury(node.peer)
        if self._wanted:
            self._to_check = iter(list(self._wanted))
        return []

    def _changed(self, event: Changed, now: int) -> list[DirectoryCommand]:
        node = self._nodes.get(event.peer)
        if node is None:
            return []
        seq = node.seqs[event.tier]
        if seq is None or event.seq <= seq:
            return []  # before the snapshot that comes, or contained in it
        if event.seq != seq + 1:
            self.counters["gaps"] += 1
            node.seqs[event.tier] = None
            node.until = now + self._config.settle_ns
            return [Snapshot(event.peer)]
        node.seqs[event.tier] = event.seq
        self.counters["reported"] += len(event.added) + len(event.removed)
        holder = Holder(event.peer, event.tier)
        self.holders.add(holder, event.added)
        self.holders.remove(holder, event.removed)
        if self._wanted:
            self._look_at(event.added, now)
            self._look_at(event.removed, now)
        return []

    def _told(self, event: Told, now: int) -> list[DirectoryCommand]:
        node = self._nodes.get(event.peer)
        if node is None:
            return []
        holder = Holder(event.peer, event.tier)
        if event.is_first:
            node.seqs[event.tier] = None
            node.missing[event.tier] = set(self.holders.of(holder))
        elif event.tier not in node.missing:
            return []  # the rest of one that was broken off
        node.missing[event.tier].difference_update(event.keys)
        self.holders.add(holder, event.keys)
        if event.is_last:
            gone = sorted(node.missing.pop(event.tier))
            self.holders.remove(holder, gone)
            node.seqs[event.tier] = event.seq
            if self._wanted:
                self._to_check = iter(list(self._wanted))
        return []

    # ------------------------------------------------------------ tenants

    def _uses(self, event: Uses, now: int) -> list[DirectoryCommand]:
        node = self._nodes.get(event.peer)
        if node is not None:
            node.usage = event.usage
            self._usage_changed(now)
        return []

    def _usage_changed(self, now: int) -> None:
        if self._usage_at is None:
            self._usage_at = now + self._config.usage_ns

    def _tell_usage(self) -> list[DirectoryCommand]:
        """Whom it concerns."""
        total = self.usage()
        commands: list[DirectoryCommand] = []
        for node in self._nodes.values():
            others = {name: left for name, used in total.items() if (left := used - node.usage.get(name, 0))}
            if others != node.elsewhere:
                node.elsewhere = others
                commands.append(Elsewhere(node.peer, others))
        return commands

    def usage(self) -> dict[str, int]:
        """Bytes of memory by tenant, of those that have a quota."""
        total: Counter[str] = Counter()
        for node in self._nodes.values():
            total.update(node.usage)
        return dict(total)

    # ------------------------------------------------------------ clients

    def _find(self, event: Find, now: int) -> list[DirectoryCommand]:
        return [self._found(event, now)]

    def _found(self, event: Find | Want, now: int) -> Found:
        sets = self.holders.sets
        numbers = self.holders.find(event.keys)
        members = {number: sets[number] for number in dict.fromkeys(numbers) if sets[number]}
        nodes = {holder.node: self._nodes[holder.node].info for each in members.values() for holder in each}
        unknown = len(members) < len(set(numbers)) and not self._knows_all(now)
        self.counters["lookups"] += len(numbers)
        self.counters["unknown"] += unknown
        return Found(event.peer, event.request_id, numbers, members, nodes, unknown)

    def _knows_all(self, now: int) -> bool:
        """Whether nobody may have what is not known here."""
        return now >= self._settled_at and all(node.is_known or now >= node.until for node in self._nodes.values())

    def _want(self, event: Want, now: int) -> list[DirectoryCommand]:
        wanted, num_replicas = self._wanted, min(event.num_replicas, REPLICAS_MAX)
        for key in event.keys:
            if num_replicas <= 1:
                wanted.pop(key, None)
                self._short.pop(key, None)
            elif key in wanted or len(wanted) < WANTED_MAX:
                wanted[key] = num_replicas
        self._look_at(event.keys, now)
        return [*self._copies(event.keys, now), self._found(event, now)]

    # ------------------------------------------------------------ replicas

    def _look_at(self, keys: Sequence[bytes], now: int) -> None:
        """Whether these, if they are wanted, have enough replicas now. A key without any is wanted no more."""
        wanted, short = self._wanted, self._short
        for key, number in zip(keys, self.holders.find(keys), strict=True):
            num_wanted = wanted.get(key)
            if num_wanted is None:
                continue
            num_nodes = len({holder.node for holder in self.holders.sets[number]})
            if num_nodes >= num_wanted:
                short.pop(key, None)
            elif num_nodes:
                short.setdefault(key, now)
            elif self._knows_all(now):
                del wanted[key]
                short.pop(key, None)

    def _step(self, now: int) -> list[DirectoryCommand]:
        if self.holders.sweeping:
            self.holders.sweep()
        if self._to_check is not None:
            keys = list(islice(self._to_check, CHECK_KEYS))
            self._look_at(keys, now)
            if len(keys) < CHECK_KEYS:
                self._to_check = None
        return self._copies(list(islice(self._short, CHECK_KEYS)), now)

    def _copies(self, keys: Sequence[bytes], now: int) -> list[DirectoryCommand]:
        """Ask for those replicas of these that are missing and due."""
        wishes: dict[tuple[int, int], list[bytes]] = {}
        for key in keys:
            if self._short.get(key, now + 1) > now:
                continue
            del self._short[key]
            self._short[key] = now + self._config.retry_ns  # behind all others
            [number] = self.holders.find((key,))
            holders = self.holders.sets[number] if number != NOBODY else ()
            held = dict.fromkeys([holder.node for holder in holders])
            target = self._best_target(key, held, now)
            if held and target is not None:
                wishes.setdefault((next(iter(held)), target), []).append(key)
        commands: list[DirectoryCommand] = []
        for (source, target), wished in wishes.items():
            self.counters["copies_asked"] += len(wished)
            for first in range(0, len(wished), COPY_KEYS):
                part = tuple(wished[first : first + COPY_KEYS])
                commands.append(Copy(target, self._nodes[source].info, part))
        return commands

    def _best_target(self, key: bytes, held: dict[int, None], now: int) -> int | None:
        """Spread over nodes by a hash of key and name: each would say the same; another one with every retry."""
        turn = (now // self._config.retry_ns).to_bytes(8, "little")
        others = [node for node in self._nodes.values() if node.peer not in held]
        best = max(
            others,
            key=lambda node: hashlib.blake2b(turn + key + node.info.name.encode(), digest_size=8).digest(),
            default=None,
        )
        return None if best is None else best.peer

    def check_integrity(self) -> None:
        self.holders.check_integrity()
        assert self._short.keys() <= self._wanted.keys(), "a replica is missing that nobody wants"
        live = {holder.node for members in self.holders.sets for holder in members}
        assert live <= self._nodes.keys(), "a dead node holds something"
