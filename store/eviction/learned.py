"""Our own policy: what is worth least goes first, and of a chain its end.

What an object is worth is the hit density that `ReuseModel` learns for objects like it, by their age. Two traits tell objects
apart:

* how often it was used, remembered for a while after it is gone (a ghost). Most blocks are never used again, so one that comes
  a second time says much;
* how deep in its chain it lies, in octaves: many prompts begin alike, and few are alike for long.

Sizes do not matter to the order: a byte of any object is worth the same computing.

Objects that went idle together and are of one class make a group, which is in one of the queues of the classes, oldest first.
Only the heads of the queues are compared, since density falls with age but for the time in which an answer is due. A group's
last block goes first. If a candidate hangs off it (it is its suffix, in another group), the group is parked until that is gone
or leased: so a suffix goes before its prefix, whatever they are thought to be worth.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from mooncake.store.eviction.ghosts import Ghosts
from mooncake.store.eviction.reuse_model import ReuseModel

USES_MAX = 4
"""Beyond that all objects are alike."""
NUM_DEPTHS = 8
"""Octaves: the last one is of blocks behind the 64th."""
GHOSTS_PER_OBJECT = 4
"""Between so many and twice as many are remembered for each object that is here. A conversation's next turn often comes when
several times the store's contents have passed."""
COMPARISONS = 16
"""While as many objects as there are here go idle, all heads are compared anew, as the densities of all of them change."""
_NUM_KINDS = USES_MAX * NUM_DEPTHS
_FEW_QUEUED = 64
"""Groups that need not be cleared of empty ones."""


class _Node:
    """One object. kind: its class, first by uses and then by depth. group: None while it is leased. num_children: candidates
    that hang off it."""

    __slots__ = ("depth", "group", "key", "kind", "num_children", "parent", "row")

    def __init__(self, row: int, key: bytes, parent: _Node | None, uses: int) -> None:
        self.row = row
        self.key = key
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.kind = (uses - 1) * NUM_DEPTHS + min(self.depth.bit_length(), NUM_DEPTHS - 1)
        self.num_children = 0
        self.group: _Group | None = None


class _Group:
    """nodes: in chain order, with some that have left it."""

    __slots__ = ("kind", "nodes", "number", "origin", "since")

    def __init__(self, kind: int, since: int, number: int, nodes: list[_Node]) -> None:
        self.kind = kind
        self.since = since
        self.number = number
        self.origin = kind, since
        """What is remembered of an object that was evicted."""
        self.nodes = nodes

    def last(self) -> _Node | None:
        """The one to go first; None if all have left."""
        nodes = self.nodes
        while nodes and nodes[-1].group is not self:
            nodes.pop()
        return nodes[-1] if nodes else None


class Learned:
    def __init__(self) -> None:
        self._nodes: dict[int, _Node] = {}
        self._queues: list[list[tuple[int, _Group]]] = [[] for _ in range(_NUM_KINDS)]
        """Heaps by the groups' numbers: one that was parked comes back to its place."""
        self._heads: dict[int, float] = {}
        """Densities of the first groups of those that are not empty, when last compared or when they became the first."""
        self._compare_at = 0
        self._parked: dict[_Node, _Group] = {}
        """By the group's last node, off which candidates hang."""
        self._num_queued = 0
        self._num_candidates = 0
        self._last_group = 0
        self._now = 0
        self._model = ReuseModel(USES_MAX, NUM_DEPTHS)
        self._ghosts: Ghosts[tuple[int, int]] = Ghosts()

    def __len__(self) -> int:
        return self._num_candidates

    def add(
        self, rows: Sequence[int], keys: Sequence[bytes], sizes: Sequence[int], parents: Sequence[int | None]
    ) -> None:
        nodes, recall = self._nodes, self._ghosts.recall
        for row, key, parent in zip(rows, keys, parents, strict=True):
            ghost, uses = recall(key), 1
            if ghost is not None:
                kind, since = ghost
                self._model.used(kind, self._now - since, 1)
                uses = min(kind // NUM_DEPTHS + 2, USES_MAX)
            nodes[row] = _Node(row, key, nodes.get(parent) if parent is not None else None, uses)

    def hold(self, rows: Sequence[int]) -> None:
        nodes = [self._nodes[row] for row in rows]
        for group, count in Counter([node.group for node in nodes]).items():
            assert group is not None  # they are candidates
            self._model.used(group.kind, self._now - group.since, count)
        for node in nodes:
            self._leave(node)
            if node.kind < _NUM_KINDS - NUM_DEPTHS:
                node.kind += NUM_DEPTHS
            if node.num_children:
                self._unpark(node)  # others of its group may be the next
            if node.parent is not None and node.parent.group is not None:
                node.parent = None  # it was leased without what is before it, so it is no suffix of that

    def idle(self, rows: Sequence[int]) -> None:
        self._now += len(rows)
        self._num_candidates += len(rows)
        for kind, nodes in groupby([self._nodes[row] for row in rows], attrgetter("kind")):
            self._add_group(kind, list(nodes))
        self._model.refit(self._now, len(self._nodes))
        if self._now >= self._compare_at:
            self._heads = {kind: self._density(self._queues[kind][0][1]) for kind in self._heads}
            self._compare_at = self._now + len(self._nodes) // COMPARISONS
        if self._num_queued > 2 * self._num_candidates + _FEW_QUEUED:
            self._drop_empty()

    def discard(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self._nodes[row]

    def take(self, num_bytes: int, sizes: Sequence[int]) -> list[int]:
        taken: list[int] = []
        heads = self._heads
        while num_bytes > 0 and heads:
            kind = min(heads, key=heads.__getitem__)
            group = self._queues[kind][0][1]
            node = group.last()
            while num_bytes > 0 and node is not None and not node.num_children:
                self._evict(node, group)
                taken.append(node.row)
                num_bytes -= sizes[node.row]
                node = group.last()
            if num_bytes > 0:
                self._find_head(kind)
        return taken

    # ------------------------------------------------------------ candidates

    def _evict(self, node: _Node, group: _Group) -> None:
        self._ghosts.remember(node.key, group.origin, GHOSTS_PER_OBJECT * len(self._nodes))
        del self._nodes[node.row]
        self._leave(node)

    def _leave(self, node: _Node) -> None:
        """It is no candidate any more."""
        node.group = None
        self._num_candidates -= 1
        parent = node.parent
        if parent is not None:
            parent.num_children -= 1
            if not parent.num_children:
                self._unpark(parent)

    # ------------------------------------------------------------ queues

    def _add_group(self, kind: int, nodes: list[_Node]) -> None:
        self._last_group += 1
        group = _Group(kind, self._now, self._last_group, nodes)
        for node in nodes:
            node.group = group
            if node.parent is not None:
                node.parent.num_children += 1
        self._enqueue(group)
        self._model.born(kind, len(nodes))

    def _enqueue(self, group: _Group) -> None:
        queue = self._queues[group.kind]
        heapq.heappush(queue, (group.number, group))
        self._num_queued += 1
        if queue[0][1] is group:
            self._heads[group.kind] = self._density(group)

    def _unpark(self, node: _Node) -> None:
        group = self._parked.pop(node, None)
        if group is not None:
            self._enqueue(group)

    def _find_head(self, kind: int) -> None:
        """The first group of a queue that can be evicted. Those before it are parked, if any are left in them."""
        queue = self._queues[kind]
        while queue:
            group = queue[0][1]
            node = group.last()
            if node is not None and not node.num_children:
                self._heads[kind] = self._density(group)
                return
            heapq.heappop(queue)
            self._num_queued -= 1
            if node is not None:
                self._parked[node] = group
        self._heads.pop(kind, None)

    def _density(self, group: _Group) -> float:
        return self._model.density(group.kind, self._now - group.since)

    def _drop_empty(self) -> None:
        """Groups that all have left, which are found only when they get to the head."""
        for kind, queue in enumerate(self._queues):
            queue[:] = [each for each in queue if each[1].last() is not None]
            heapq.heapify(queue)
            self._find_head(kind)
        self._num_queued = sum(map(len, self._queues))
