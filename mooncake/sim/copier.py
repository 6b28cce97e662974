"""Copies between store nodes in virtual time: what `mooncake.store.copier` is to live nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mooncake.core.messages import CopyBlocks
from mooncake.core.types import KvSource
from mooncake.sim.node import NodeClient, SimNode, SimSource, SimTarget
from mooncake.store.copies import Copies, Wish

ConnectNode = Callable[[str, str], NodeClient | None]
"""A new client at (node, for a process), or None if the node cannot be reached."""


class SimCopier:
    def __init__(self, node: SimNode, connect: ConnectNode) -> None:
        self.copies = Copies()
        self._node = node
        self._connect = connect
        self.running: _Copy | None = None

    def wish(self, message: CopyBlocks) -> None:
        """The keys of such a wish are block keys: a simulated node has one shard."""
        source = message.source
        self.copies.wish(Wish(source.node, source.addresses, source.block_keys), self._node.loop.now)
        self._next()

    def kill(self) -> None:
        if self.running is not None:
            self.running.close()

    def lose_node(self, node: str) -> None:
        if self.running is not None and self.running.source.node == node:
            self.running.theirs.lose()

    def _next(self) -> None:
        chunk = self.copies.next(self._node.loop.now)
        if chunk is None:
            return
        theirs = self._connect(chunk.node, self._node.name)
        if theirs is None:
            self._node.loop.after(0, self._ended, False)
            return
        ours = self._node.attach(self._node.name, self._node)
        source = KvSource(chunk.node, len(chunk.keys) * self._node.config.block_tokens, chunk.keys)
        self.running = _Copy(source, theirs, ours, self._ended)

    def _ended(self, whole: bool) -> None:
        if self._node.runner.alive:
            self.running = None
            self.copies.done(whole=whole)
            self._next()


class _Copy:
    """One chunk: leased there, room reserved here, copied block after block, committed; then both connections end."""

    def __init__(self, source: KvSource, theirs: NodeClient, ours: NodeClient, ended: Callable[[bool], None]) -> None:
        self.source = source
        self.theirs = theirs
        self._ours = ours
        self._ended = ended
        self._ranges: Iterator[tuple[int, int]] = iter(())
        self._num_running = 0
        self._is_good = True
        self._reader = SimSource(theirs, source, self._leased)

    def close(self) -> None:
        self.theirs.close()
        self._ours.close()

    def _end(self, whole: bool) -> None:
        self.close()
        self._ended(whole)

    def _leased(self, num_tokens: int) -> None:
        if not num_tokens:
            self._end(False)
            return
        num_blocks = num_tokens * len(self.source.block_keys) // self.source.num_tokens
        target = KvSource(self._ours.node.name, num_tokens, self.source.block_keys[:num_blocks])
        self._writer = SimTarget(self._ours, target, self._reserved)

    def _reserved(self, granted: bool) -> None:
        if granted:
            self._ranges = iter(self._writer.open_blocks())
            self._copy_next()
        else:
            self._end(False)

    def _copy_next(self) -> None:
        """Others may use the links between two blocks."""
        following = next(self._ranges, None)
        if following is None:
            self._writer.commit(0, len(self.source.block_keys), self._committed)
            return
        self._num_running = 2
        for copy in (self._reader.copy, self._writer.copy):
            copy(*following, self._copied)

    def _copied(self, ok: bool) -> None:
        self._num_running -= 1
        self._is_good = self._is_good and ok
        if not self._num_running:
            if self._is_good:
                self._copy_next()
            else:
                self._end(False)

    def _committed(self, ok: bool) -> None:
        self._end(ok and self._writer.num_tokens == self.source.num_tokens)
