"""What the Conductor knows of its instances and store nodes.

Slots are those of the prefix index; slot 0 is nobody. `prefill` and `decode` are the pools of the instances that may be
placed on now; colocated instances are in the decode pool.
"""

from __future__ import annotations

from mooncake.core.messages import NodeInfo, NodeLoad
from mooncake.core.types import InstanceInfo, InstanceLoad
from mooncake.scheduler.lengths import Lengths
from mooncake.scheduler.links import Links
from mooncake.scheduler.pools import Instance, Node, Pool
from mooncake.scheduler.prefix_index import ANY, level_bit


class View:
    def __init__(self, links: Links, lengths: Lengths) -> None:
        self.links = links
        self.lengths = lengths
        self.instances: dict[str, Instance] = {}
        self.nodes: dict[str, Node] = {}
        self.names: tuple[str, ...] = ("",)
        """By slot; a new tuple with every change, so that records can keep it."""
        self.node_bits = 0
        """Those of the prefix index that say a store node has a block, in any tier."""
        self.num_stale_reports = 0
        self.fits_everywhere = 0
        """Tokens of a prompt that every ready instance can take, if there are any of both kinds, else 0."""
        self._pools: tuple[Pool, Pool] | None = None
        """Of prefill and decode; None after a change of membership, until somebody asks."""

    # ------------------------------------------------------------ pools

    @property
    def pools(self) -> tuple[Pool, Pool]:
        """Ready prefill instances, and ready decode instances."""
        if self._pools is None:
            self._pools = self._make_pools()
        return self._pools

    def _make_pools(self) -> tuple[Pool, Pool]:
        for instance in self.instances.values():
            instance.pool = None
        ready = [instance for instance in self.instances.values() if instance.placeable]
        prefill = Pool([instance for instance in ready if instance.does_prefill], self.node_slot)
        decode = Pool([instance for instance in ready if not instance.does_prefill], self.node_slot)
        self.fits_everywhere = min(prefill.capacity_min, decode.capacity_min - 1)
        return prefill, decode

    def node_slot(self, name: str) -> int:
        """Slot of the store node, or 0 if it is not registered."""
        node = self.nodes.get(name)
        return node.slot if node is not None else 0

    # ------------------------------------------------------------ membership

    def add_instance(self, info: InstanceInfo, slot: int, width: int) -> None:
        self._set_name(slot, width, info.name)
        self.instances[info.name] = Instance(info, slot)
        self._pools = None

    def add_node(self, info: NodeInfo, slot: int, width: int) -> None:
        self._set_name(slot, width, info.name)
        self.nodes[info.name] = Node(info, slot)
        self.node_bits |= level_bit(slot, ANY)
        self._pools = None

    def remove(self, name: str) -> None:
        """Its bookings must have been released."""
        slot = self.slot(name)
        instance = self.instances.pop(name, None)
        if instance is not None:
            instance.pool = None
        if self.nodes.pop(name, None) is not None:
            self.node_bits ^= level_bit(slot, ANY)
        self.links.clear(slot)
        self._set_name(slot, len(self.names), "")
        self._pools = None

    def update(self, info: InstanceInfo) -> None:
        """State or cost of a known instance changed."""
        self.instances[info.name].set_info(info)
        self._pools = None

    def connect(self, name: str, connected: bool) -> None:
        self._member(name).connected = connected
        self._pools = None

    def hold(self, name: str, held: bool) -> None:
        self.instances[name].held = held
        self._pools = None

    def slot(self, name: str) -> int:
        return self._member(name).slot

    def connected(self, name: str) -> bool:
        return self.knows(name) and self._member(name).connected

    def knows(self, name: str) -> bool:
        return name in self.instances or name in self.nodes

    def _member(self, name: str) -> Instance | Node:
        return self.instances.get(name) or self.nodes[name]

    def _set_name(self, slot: int, width: int, name: str) -> None:
        names = self.names + ("",) * (width - len(self.names))
        self.names = (*names[:slot], name, *names[slot + 1 :])
        self.links.resize(width)

    # ------------------------------------------------------------ load

    def report(self, load: InstanceLoad, now: int) -> Instance | None:
        """Take a load report; whose it is, or None if it is stale."""
        instance = self.instances.get(load.name)
        if instance is None or instance.info.epoch != load.epoch or load.seq <= instance.last_report:
            self.num_stale_reports += 1
            return None
        instance.last_report = load.seq
        waited_for = -(-load.waiting_context // instance.info.page_tokens)
        instance.used_pages = max(0, instance.info.num_pages - load.free_pages) + waited_for
        instance.num_waiting = load.num_waiting
        instance.load = load
        instance.throughput.note(load.num_computed_tokens, now)
        backlog_until = _backlog_until(instance, load, now)
        if backlog_until != instance.backlog_until:
            instance.backlog_until = backlog_until
            instance.set_work()
        if not instance.does_prefill:
            num_seqs = float(load.num_running + load.num_waiting)
            instance.set_batch(num_seqs, load.context_tokens + load.waiting_context, self.lengths.mean_left)
            if instance.pool is not None:
                instance.pool.set_load(instance)
        return instance

    def report_node(self, load: NodeLoad) -> None:
        node = self.nodes.get(load.name)
        if node is None or node.info.epoch != load.epoch:
            self.num_stale_reports += 1
        else:
            node.tiers = load.tiers

    # ------------------------------------------------------------ conservation

    def check_integrity(self) -> None:
        members: list[Instance | Node] = [*self.instances.values(), *self.nodes.values()]
        slots = [member.slot for member in members]
        assert 0 not in slots and len(slots) == len(set(slots)), "members share a slot"
        assert all(self.names[member.slot] == member.info.name for member in members)
        assert sum(name != "" for name in self.names) == len(slots), "a slot is named but has no member"
        if self._pools is None:
            return
        prefill, decode = self._pools
        ready = sorted(instance.info.name for instance in self.instances.values() if instance.placeable)
        assert sorted((*prefill.names, *decode.names)) == ready, "the pools are not the ready instances"
        for pool in (prefill, decode):
            assert pool.queue == sorted(pool.queue) and len(pool.queue) == len(pool)
            for row, member in enumerate(pool.members):
                assert member.pool is pool and member.row == row
                assert (member.busy_until, member.prefill_turn, row) in pool.queue
                assert member.busy_until == max(member.booked_until, member.backlog_until)
                load_ns = pool.load_ns[row]
                pool.set_load(member)
                assert pool is prefill or pool.load_ns[row] == load_ns


def _backlog_until(instance: Instance, load: InstanceLoad, now: int) -> int:
    """When prefills will be done that wait there and that the books do not know: the work of a Conductor before this
    one. Of the others the books know how much their cache saves."""
    num_unknown = load.num_waiting - instance.num_prefills
    if num_unknown <= 0 or not load.waiting_tokens or not (instance.does_prefill or instance.prefills_in_place):
        return 0
    waiting_ns = instance.info.cost.prefill_ns(load.waiting_tokens, 0)
    return now + waiting_ns * num_unknown // load.num_waiting
