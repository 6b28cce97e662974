"""What the Conductor knows of its instances and store nodes, as numpy columns indexed by slot.

Slots are those of the prefix index, so that match lengths and columns line up; slot 0 is nobody (zeros everywhere),
which is also the node of an instance whose store node is not registered. Times in columns are nanoseconds of the
Conductor's clock.

Load is known twice: from reports, which lag, and from the books, which know what was placed but not how it goes. The
columns keep both; `costs` joins them. Reported columns are overwritten by reports; booked columns are written by
`Books` alone.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from mooncake.core.messages import NodeInfo
from mooncake.core.types import NANOS_PER_MS, CostModel, InstanceInfo, InstanceLoad, InstanceState, Role

_NS_PER_MS: Final = float(NANOS_PER_MS)


class Instance:
    __slots__ = ("connected", "info", "load", "slot")

    def __init__(self, info: InstanceInfo, slot: int) -> None:
        self.info = info
        self.slot = slot
        self.connected = True
        self.load: InstanceLoad | None = None

    @property
    def placeable(self) -> bool:
        return self.connected and self.info.state is InstanceState.READY


class Node:
    __slots__ = ("connected", "info", "slot")

    def __init__(self, info: NodeInfo, slot: int) -> None:
        self.info = info
        self.slot = slot
        self.connected = True


class Columns:
    """One array per field, all of the same length. Growing replaces the arrays: never keep one across events."""

    placeable: np.ndarray
    is_prefill: np.ndarray
    is_decode: np.ndarray
    """Decode and colocated instances."""
    is_colocated: np.ndarray
    is_node: np.ndarray
    node: np.ndarray
    """Slot of the instance's store node, or 0."""
    capacity_tokens: np.ndarray
    page_tokens: np.ndarray
    max_batch: np.ndarray
    prefill_a: np.ndarray
    """The cost model in nanoseconds: prefill = a + n (b + c (P + n/2)), decode step = a + b B + c ctx."""
    prefill_b: np.ndarray
    prefill_c: np.ndarray
    decode_a: np.ndarray
    decode_b: np.ndarray
    decode_c: np.ndarray

    backlog_until: np.ndarray
    """Reported: when the prefill tokens of the last report will be computed."""
    num_seqs: np.ndarray
    """Reported: sequences running and waiting in the decode batch."""
    context_tokens: np.ndarray
    free_pages: np.ndarray

    num_prefills: np.ndarray
    """Booked: prefills placed and not done, their predicted time, and when they will be done one after the other."""
    prefill_ns: np.ndarray
    busy_until: np.ndarray
    num_decodes: np.ndarray
    """Booked: attempts that decode here or will."""
    pending_seqs: np.ndarray
    """Booked and in no load report yet: sequences, their tokens and pages."""
    pending_tokens: np.ndarray
    pending_pages: np.ndarray

    BOOLS: Final = ("placeable", "is_prefill", "is_decode", "is_colocated", "is_node")
    FLOATS: Final = ("prefill_a", "prefill_b", "prefill_c", "decode_a", "decode_b", "decode_c")
    INTS: Final = (
        *("node", "capacity_tokens", "page_tokens", "max_batch"),
        *("backlog_until", "num_seqs", "context_tokens", "free_pages"),
        *("num_prefills", "prefill_ns", "busy_until", "num_decodes", "pending_seqs", "pending_tokens", "pending_pages"),
    )
    BOOKED: Final = ("num_prefills", "prefill_ns", "num_decodes", "pending_seqs", "pending_tokens", "pending_pages")
    """The columns that are sums over bookings."""

    def __init__(self) -> None:
        self.resize(1)

    def resize(self, width: int) -> None:
        for names, dtype in ((self.BOOLS, np.bool_), (self.FLOATS, np.float64), (self.INTS, np.int64)):
            for name in names:
                column = np.zeros(width, dtype=dtype)
                old = getattr(self, name, column[:0])
                column[: len(old)] = old
                setattr(self, name, column)
        self.page_tokens[self.page_tokens == 0] = 1  # divisor

    def clear(self, slot: int) -> None:
        for name in (*self.BOOLS, *self.FLOATS, *self.INTS):
            getattr(self, name)[slot] = 0
        self.page_tokens[slot] = 1

    def set_cost(self, slot: int, cost: CostModel) -> None:
        a, b, c = cost.prefill
        self.prefill_a[slot], self.prefill_b[slot], self.prefill_c[slot] = a * _NS_PER_MS, b * _NS_PER_MS / 1e3, c
        a, b, c = cost.decode
        self.decode_a[slot], self.decode_b[slot], self.decode_c[slot] = a * _NS_PER_MS, b * _NS_PER_MS, c


class View:
    def __init__(self) -> None:
        self.columns = Columns()
        self.instances: dict[str, Instance] = {}
        self.nodes: dict[str, Node] = {}
        self.names: tuple[str, ...] = ("",)
        """By slot; a new tuple with every change, so that records can keep it."""
        self.prefill_ready = self.decode_ready = self.colocated_ready = np.zeros(1, dtype=np.bool_)
        """Slots that may be placed on, by what they can do."""
        self.num_stale_reports = 0

    # ------------------------------------------------------------ membership

    def add_instance(self, info: InstanceInfo, slot: int, width: int) -> None:
        self._make_slot(slot, width, info.name)
        columns = self.columns
        columns.is_prefill[slot] = info.role is Role.PREFILL
        columns.is_decode[slot] = info.role is not Role.PREFILL
        columns.is_colocated[slot] = info.role is Role.COLOCATED
        columns.capacity_tokens[slot] = info.num_pages * info.page_tokens
        columns.page_tokens[slot] = max(1, info.page_tokens)
        columns.max_batch[slot] = max(1, info.max_batch)
        columns.free_pages[slot] = info.num_pages
        columns.set_cost(slot, info.cost)
        self.instances[info.name] = Instance(info, slot)
        self._refresh()

    def add_node(self, info: NodeInfo, slot: int, width: int) -> None:
        self._make_slot(slot, width, info.name)
        self.columns.is_node[slot] = True
        self.nodes[info.name] = Node(info, slot)
        self._refresh()

    def remove(self, name: str) -> None:
        """Its bookings must have been released."""
        slot = self.slot(name)
        self.instances.pop(name, None)
        self.nodes.pop(name, None)
        self.columns.clear(slot)
        self._set_name(slot, "")
        self._refresh()

    def update(self, info: InstanceInfo) -> None:
        """State or cost of a known instance changed."""
        instance = self.instances[info.name]
        instance.info = info
        self.columns.set_cost(instance.slot, info.cost)
        self._refresh()

    def connect(self, name: str, connected: bool) -> None:
        self._member(name).connected = connected
        self._refresh()

    def slot(self, name: str) -> int:
        return self._member(name).slot

    def connected(self, name: str) -> bool:
        return self.knows(name) and self._member(name).connected

    def knows(self, name: str) -> bool:
        return name in self.instances or name in self.nodes

    def _member(self, name: str) -> Instance | Node:
        return self.instances.get(name) or self.nodes[name]

    def _make_slot(self, slot: int, width: int, name: str) -> None:
        if width > len(self.columns.placeable):
            self.columns.resize(width)
            self.names += ("",) * (width - len(self.names))
        self._set_name(slot, name)

    def _set_name(self, slot: int, name: str) -> None:
        self.names = (*self.names[:slot], name, *self.names[slot + 1 :])

    def _refresh(self) -> None:
        columns = self.columns
        for instance in self.instances.values():
            node = self.nodes.get(instance.info.node)
            columns.node[instance.slot] = node.slot if node is not None else 0
            columns.placeable[instance.slot] = instance.placeable
        self.prefill_ready = columns.placeable & columns.is_prefill
        self.decode_ready = columns.placeable & columns.is_decode
        self.colocated_ready = columns.placeable & columns.is_colocated

    # ------------------------------------------------------------ load

    def report(self, load: InstanceLoad, now: int) -> int | None:
        """Take a load report; its slot, or None if it is stale."""
        instance = self.instances.get(load.name)
        last = instance.load.seq if instance is not None and instance.load is not None else -1
        if instance is None or instance.info.epoch != load.epoch or load.seq <= last:
            self.num_stale_reports += 1
            return None
        instance.load = load
        slot, columns = instance.slot, self.columns
        columns.backlog_until[slot] = now + int(columns.prefill_b[slot] * load.waiting_tokens)
        columns.num_seqs[slot] = load.num_running + load.num_waiting
        columns.context_tokens[slot] = load.context_tokens
        columns.free_pages[slot] = load.free_pages
        return slot

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        members: list[Instance | Node] = [*self.instances.values(), *self.nodes.values()]
        slots = [member.slot for member in members]
        assert 0 not in slots and len(slots) == len(set(slots)), "members share a slot"
        assert all(self.names[member.slot] == member.info.name for member in members)
        assert sum(name != "" for name in self.names) == len(slots), "a slot is named but has no member"
        placeable = sorted(instance.slot for instance in self.instances.values() if instance.placeable)
        assert np.flatnonzero(self.columns.placeable).tolist() == placeable
        for name in (*Columns.BOOKED, "free_pages"):
            assert (getattr(self.columns, name) >= 0).all(), f"{name} is negative"


class Lengths(msgspec.Struct):
    """Output lengths of completed requests, learnt as a moving mean. Policies see this and max_tokens, never the
    truth."""

    mean: float = 256.0
    weight: float = 0.02

    def learn(self, num_output: int) -> None:
        self.mean += self.weight * (num_output - self.mean)

    def expect(self, max_tokens: int | None, num_generated: int) -> int:
        """Output tokens still to come."""
        left = max(1, int(self.mean) - num_generated)
        return left if max_tokens is None else max(1, min(left, max_tokens - num_generated))
