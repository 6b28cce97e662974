"""Who is in the cluster: registration, compatibility, life cycle, loss.

    Register --> known --PeerGone--> unreachable --grace passed, or a newer epoch, or state gone--> forgotten
                   ^                     |
                   +------ Register -----+   (same epoch: bookings and cache entries are still true)

An unreachable instance is not placed on and an unreachable node is not read from, but nothing is released before the
grace has passed. The first instance to become ready fixes the cluster's compatibility hash for as long as any
instance is known. Names of instances and nodes share one space. The shell reports a peer gone only if no newer
connection bears its name.

Beside that an operator may hold an instance: it stays, finishes what it has and takes nothing new. This is remembered twice,
by name here and by the instance, so that it outlives a restart of either of them.
"""

from __future__ import annotations

import msgspec

from mooncake.core.messages import Hold, Members, NodeInfo, Register, Registered, RegisterNode, Send, StateChange
from mooncake.core.types import InstanceInfo, InstanceState, Tier
from mooncake.scheduler.admission import Accuracy
from mooncake.scheduler.bookings import Books
from mooncake.scheduler.costs import BlockCosts
from mooncake.scheduler.feeds import CacheFeeds
from mooncake.scheduler.prefix_index import PrefixIndex
from mooncake.scheduler.view import View

_NUM_HELD_MAX = 1024
"""Names held, as those that are gone may come back; of more, the oldest are forgotten."""


class Membership:
    def __init__(
        self,
        view: View,
        books: Books,
        index: PrefixIndex,
        feeds: CacheFeeds,
        accuracy: Accuracy,
        costs: BlockCosts,
    ) -> None:
        self._view = view
        self._books = books
        self._index = index
        self._feeds = feeds
        self._accuracy = accuracy
        self._costs = costs
        self.compat = ""
        """That of the cluster, or "" as long as no instance was ready."""
        self.num_refused = 0
        self.held: dict[str, None] = {}
        """Names of instances, here or not, that are to take nothing new."""

    def members(self) -> Members:
        return Members(tuple(instance.seen for instance in self._view.instances.values()))

    # ------------------------------------------------------------ instances

    def register(self, sender: str, message: Register, now: int) -> list[Send]:
        info = message.info
        known = self._view.instances.get(info.name)
        refusal = self._refusal(info, sender)
        if refusal:
            return self._refuse(sender, refusal)
        if known is not None and known.info.epoch != info.epoch:
            self.forget(info.name, now)
            known = None
        if info.state is InstanceState.GONE:
            return [Send(sender, Registered(True))]
        if known is None:
            slot = self._index.add_holder()
            self._view.add_instance(info, slot, self._index.width)
        else:
            slot = known.slot
            self._view.connect(info.name, True)
            self._view.update(info)
            self._index.show(slot)
        asked = self._feeds.open(info.name, info.epoch, slot, Tier.HBM, now)
        return [Send(sender, Registered(True)), *self._still_hold(info), *asked, *self._fix_compat(now)]

    def _still_hold(self, info: InstanceInfo) -> list[Send]:
        """It or an earlier life of it, or of this Conductor, was told to take nothing new."""
        if info.held:
            self._remember(info.name)
        held = info.name in self.held
        self._view.hold(info.name, held)
        return [Send(info.name, Hold(info.name, True))] if held and not info.held else []

    def hold(self, name: str, held: bool) -> list[Send]:
        """The instance takes nothing new from now on, or takes requests again."""
        if held:
            self._remember(name)
        else:
            self.held.pop(name, None)
        if name not in self._view.instances:
            return []
        self._view.hold(name, held)
        return [Send(name, Hold(name, held))]

    def _remember(self, name: str) -> None:
        self.held.pop(name, None)
        self.held[name] = None
        if len(self.held) > _NUM_HELD_MAX:
            del self.held[next(iter(self.held))]

    def _refusal(self, info: InstanceInfo, sender: str) -> str:
        """Why it may not join, or ""."""
        known = self._view.instances.get(info.name)
        if info.name != sender:
            return f"{sender!r} cannot register the name {info.name!r}"
        if info.name in self._view.nodes:
            return f"the name {info.name!r} is taken by a store node"
        if known is not None and info.epoch < known.info.epoch:
            return f"epoch {info.epoch} of {info.name!r} is older than the registered {known.info.epoch}"
        if known is not None and info.epoch == known.info.epoch and info.address != known.info.address:
            return f"the name {info.name!r} is taken by {known.info.address}, which is not {info.address}"
        if self.compat and info.compat != self.compat and not self._is_alone(info.name):
            return f"compatibility {info.compat!r} differs from the cluster's {self.compat!r}"
        return ""

    def _is_alone(self, name: str) -> bool:
        """A newer life of the only instance may bring a new model."""
        return list(self._view.instances) == [name]

    def change_state(self, message: StateChange, now: int) -> list[Send] | None:
        """None if it is stale."""
        known = self._view.instances.get(message.name)
        if known is None or known.info.epoch != message.epoch:
            return None
        if message.state is InstanceState.GONE:
            self.forget(message.name, now)
            return []
        self._view.update(msgspec.structs.replace(known.info, state=message.state, cost=message.cost))
        return self._fix_compat(now)

    def _fix_compat(self, now: int) -> list[Send]:
        """With the first ready instance the cluster's compatibility is known; those that came before and differ must
        go."""
        instances = self._view.instances
        if not self.compat:
            first = next((instance.info for instance in instances.values() if instance.placeable), None)
            if first is not None:
                self.compat = first.compat
                if first.kv_token_bytes:
                    self._costs.set_token_bytes(first.kv_token_bytes)
        if not self.compat:
            return []
        commands: list[Send] = []
        for name in [name for name, instance in instances.items() if instance.info.compat != self.compat]:
            detail = f"compatibility {instances[name].info.compat!r} differs from the cluster's {self.compat!r}"
            self.forget(name, now)
            commands += self._refuse(name, detail)
        return commands

    # ------------------------------------------------------------ store nodes

    def register_node(self, sender: str, message: RegisterNode, now: int) -> list[Send]:
        info = message.info
        known = self._view.nodes.get(info.name)
        refusal = self._node_refusal(info, sender)
        if refusal:
            return self._refuse(sender, refusal)
        if known is not None and known.info.epoch != info.epoch:
            self.forget(info.name, now)
            known = None
        if known is None:
            slot = self._index.add_holder()
            self._view.add_node(info, slot, self._index.width)
        else:
            slot = known.slot
            self._view.connect(info.name, True)
            self._index.show(slot)
        return [Send(sender, Registered(True)), *self._feeds.open(info.name, info.epoch, slot, Tier.DRAM, now)]

    def _node_refusal(self, info: NodeInfo, sender: str) -> str:
        known = self._view.nodes.get(info.name)
        if info.name != sender:
            return f"{sender!r} cannot register the name {info.name!r}"
        if info.name in self._view.instances:
            return f"the name {info.name!r} is taken by an instance"
        if known is not None and info.epoch < known.info.epoch:
            return f"epoch {info.epoch} of {info.name!r} is older than the registered {known.info.epoch}"
        if info.compat and self.compat and info.compat != self.compat:
            return f"compatibility {info.compat!r} differs from the cluster's {self.compat!r}"
        return ""

    def _refuse(self, name: str, detail: str) -> list[Send]:
        self.num_refused += 1
        return [Send(name, Registered(False, detail))]

    # ------------------------------------------------------------ loss

    def disconnect(self, name: str) -> None:
        self._view.connect(name, False)
        self._index.hide(self._view.slot(name))

    def forget(self, name: str, now: int) -> None:
        """The instance or node is gone: its bookings and cache entries with it."""
        slot = self._view.slot(name)
        instance = self._view.instances.get(name)
        if instance is not None:
            self._books.release_instance(instance, now)
        self._feeds.close(name)
        self._accuracy.forget(name)
        self._index.remove_holder(slot)
        self._view.remove(name)
        if not self._view.instances:
            self.compat = ""
