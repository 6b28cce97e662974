"""What the Conductor tells the operator: how the cluster is, why a request was placed as it was, and what came of the wish to
hold an instance. It reads what the others keep and decides nothing.
"""

from __future__ import annotations

from mooncake.core.messages import AskExplain, AskHold, ClusterStatus, InstanceStatus, NodeStatus, Told
from mooncake.core.types import NANOS_PER_MS, InstanceState, ReusedTokens
from mooncake.scheduler.bookings import Books
from mooncake.scheduler.membership import Membership
from mooncake.scheduler.placer import Placer
from mooncake.scheduler.pools import Instance, Node
from mooncake.scheduler.prefix_index import PrefixIndex
from mooncake.scheduler.view import View

DRAINED, LOST = "drained", "lost"
UNKNOWN, UNREACHABLE = "unknown", "unreachable"
_SETTLE_NS = 250 * NANOS_PER_MS
"""After a first token, until a load report must show that its KV is still held for decode."""


class Operations:
    def __init__(self, view: View, books: Books, index: PrefixIndex, membership: Membership, placer: Placer) -> None:
        self._view = view
        self._books = books
        self._index = index
        self._membership = membership
        self._placer = placer

    # ------------------------------------------------------------ status

    def status(self, number: int, num_waiting: int, now: int) -> ClusterStatus:
        placer = self._placer
        return ClusterStatus(
            number,
            placer.config.policy,
            num_waiting,
            len(self._books.bookings),
            tuple(sorted(placer.counts.items())),
            sum([each.load.reused for each in self._view.instances.values() if each.load], ReusedTokens()),
            tuple(_instance_status(instance, now) for instance in self._view.instances.values()),
            tuple(self._node_status(node, now) for node in self._view.nodes.values()),
        )

    def _node_status(self, node: Node, now: int) -> NodeStatus:
        links, slot = self._view.links, node.slot
        out_ns, in_ns, ssd_ns = (
            max(0, int(until[slot]) - now) for until in (links.out_until, links.in_until, links.ssd_until)
        )
        num_blocks = self._index.num_held(slot)
        return NodeStatus(node.info.name, node.connected, num_blocks, out_ns, in_ns, ssd_ns, node.tiers)

    # ------------------------------------------------------------ explain

    def explain(self, question: AskExplain) -> Told:
        records = self._placer.records.of_request(question.frontend, question.request)
        if records:
            return Told(question.number, "\n\n".join(record.render() for record in records))
        name = f"{question.frontend}/{question.request}"
        kept = f"the last {self._placer.config.num_records_max} are kept"
        return Told(question.number, f"no placement of {name} is known; {kept}", UNKNOWN)

    # ------------------------------------------------------------ hold

    def refusal(self, question: AskHold) -> Told | None:
        """Why an instance cannot be held, or let go, now."""
        instance = self._view.instances.get(question.name)
        if instance is None and not (question.name in self._membership.held and not question.held):
            known = ", ".join(sorted(self._view.instances)) or "none"
            return Told(question.number, f"there is no instance {question.name!r}; there are: {known}", UNKNOWN)
        if instance is not None and not instance.connected:
            detail = f"{question.name} is not connected now; try again when it is back, or gone"
            return Told(question.number, detail, UNREACHABLE)
        return None

    def outcome(self, question: AskHold, now: int) -> str:
        """To be asked when it was done."""
        instance = self._view.instances.get(question.name)
        if instance is None:
            return f"{question.name} is not here; it will take requests when it comes"
        state = _state(instance, now)
        if not question.held:
            return f"{question.name} is {state}"
        alike = [each for each in self._view.instances.values() if each.does_prefill is instance.does_prefill]
        if any(each.placeable for each in alike):
            return f"{question.name} is {state}"
        return f"{question.name} is {state}; no other {instance.info.role} instance is ready: new requests wait"


def _instance_status(instance: Instance, now: int) -> InstanceStatus:
    info, load = instance.info, instance.load
    return InstanceStatus(
        info.name,
        info.role,
        _state(instance, now),
        info.node,
        load.num_waiting if load is not None else 0,
        load.num_running if load is not None else 0,
        instance.num_prefills,
        instance.num_decodes,
        info.num_pages,
        info.num_pages - load.free_pages if load is not None else 0,
        info.max_batch,
        instance.throughput.per_s(now),
        load.step_ns if load is not None else 0,
        max(0, instance.busy_until - now),
    )


def _state(instance: Instance, now: int) -> str:
    if not instance.connected:
        return LOST
    if not instance.held or instance.info.state is not InstanceState.READY:
        return instance.info.state
    return DRAINED if _is_idle(instance, now) else InstanceState.DRAINING


def _is_idle(instance: Instance, now: int) -> bool:
    load = instance.load
    if instance.num_prefills or instance.num_decodes or now - instance.done_at < _SETTLE_NS:
        return False
    return load is None or not (load.num_attempts or load.num_waiting or load.num_running)
