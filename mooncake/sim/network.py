"""The control network: one ordered stream per pair of processes, as gRPC gives, and everything that can go wrong with it.

    dial --both alive, not cut--> open --process dies, or cut--> broken --noticed, each end for itself--> dial again

A message is lost with its stream, and at random by `loss`, which no single stream does but a chain of proxies and restarts may
seem to do. It is repeated, as after a resend, at any later time. The messages that open a stream's session are spared: a stream
without them is not open. A stream that is replaced by a newer one of the same two names is nobody's loss at its accepting end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from mooncake.core.messages import Register, Registered, RegisterNode
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.sim.loop import Loop

_SPARED = (Register, Registered, RegisterNode)


class NetworkConfig(msgspec.Struct, frozen=True):
    latency_ns: int = 300_000
    """One way, and on top of it exponentially distributed jitter."""
    jitter_ns: int = 100_000
    loss: float = 0.0
    """Shares of the messages that are lost, repeated, or held up for up to delay_ns."""
    repeat: float = 0.0
    delay: float = 0.0
    delay_ns: int = 300 * NANOS_PER_MS
    reorder: bool = False
    """Whether messages of one pair may overtake each other."""
    death_notice_ns: int = 5 * NANOS_PER_MS
    """How soon a peer's death breaks the stream (kernels close the sockets of the dead)."""
    cut_notice_ns: int = 4 * NANOS_PER_S
    """How soon both ends notice the silence of a cut."""
    redial_ns: int = 200 * NANOS_PER_MS


class Peer(Protocol):
    """A process, as the network sees it."""

    def opened(self, peer: str) -> None: ...

    def gone(self, peer: str) -> None: ...

    def received(self, sender: str, messages: list[Any]) -> None: ...


class _Stream:
    """`ends`: the names, dialling end first. An end that is not in `hears` gets nothing through this stream any more."""

    __slots__ = ("ends", "hears", "last_at", "pending")

    def __init__(self, dialler: str, acceptor: str) -> None:
        self.ends = (dialler, acceptor)
        self.hears: dict[str, None] = {}
        self.pending = True
        self.last_at = {dialler: 0, acceptor: 0}
        """By receiver: when the last message so far arrives; the next one comes no sooner."""


class _Way:
    """From one end of a stream to the other. messages: the last ones on their way, sent at sent_at: what follows at once goes
    with them."""

    __slots__ = ("messages", "receiver", "sender", "sent_at", "stream")

    def __init__(self, stream: _Stream, sender: str, receiver: str) -> None:
        self.stream = stream
        self.sender = sender
        self.receiver = receiver
        self.sent_at = -1
        self.messages: list[Any] = []


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


class Network:
    def __init__(self, loop: Loop, config: NetworkConfig, rng: random.Random) -> None:
        self.config = config
        self.num_lost = 0
        self.num_repeated = 0
        self._loop = loop
        self._rng = rng
        self._peers: dict[str, Peer] = {}
        self._dials: dict[tuple[str, str], None] = {}
        """(dialler, acceptor) pairs that are wanted."""
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._ways: dict[tuple[str, str], _Way] = {}
        """By (sender, receiver), as long as the sender holds the stream to be open."""
        self._is_plain = not (config.jitter_ns or config.loss or config.repeat or config.delay or config.reorder)
        self._cuts: dict[tuple[str, str], int] = {}
        self._on_cut: list[Callable[[str, str], None]] = []

    # ------------------------------------------------------------------ processes

    def start(self, name: str, peer: Peer) -> None:
        self._peers[name] = peer

    def kill(self, name: str) -> None:
        """The process is no more. Its peers notice soon; until then they hear what it had said."""
        del self._peers[name]
        for dial in [dial for dial in self._dials if dial[0] == name]:
            del self._dials[dial]
        for stream in list(self._streams.values()):
            if name in stream.ends:
                self._deafen(stream, name)
                self._break(stream, self.config.death_notice_ns)

    # ------------------------------------------------------------------ streams

    def dial(self, dialler: str, acceptor: str) -> None:
        """Keep a stream open from now on."""
        if (dialler, acceptor) not in self._dials:
            self._dials[dialler, acceptor] = None
            self._try(dialler, acceptor)

    def hang_up(self, dialler: str, acceptor: str) -> None:
        self._dials.pop((dialler, acceptor), None)
        stream = self._streams.get(_pair(dialler, acceptor))
        if stream is not None:
            self._break(stream, self._latency())

    def reset(self, one: str, other: str) -> None:
        """The stream between the two breaks; what is on its way is lost."""
        stream = self._streams.get(_pair(one, other))
        if stream is not None:
            self._break(stream, 0)

    def reachable(self, one: str, other: str) -> bool:
        return _pair(one, other) not in self._cuts

    def cut(self, one: str, other: str, duration: int) -> None:
        """Nothing passes between the two, which they notice by and by."""
        pair = _pair(one, other)
        self._cuts[pair] = self._cuts.get(pair, 0) + 1
        self._loop.after(duration, self._heal, pair)
        for listener in self._on_cut:
            listener(one, other)
        stream = self._streams.get(pair)
        if stream is not None:
            self._break(stream, self.config.cut_notice_ns)

    def on_cut(self, listener: Callable[[str, str], None]) -> None:
        self._on_cut.append(listener)

    def send(self, sender: str, receiver: str, message: Any) -> None:
        way = self._ways.get((sender, receiver))
        if way is None or (self._cuts and not self.reachable(sender, receiver)):
            self.num_lost += 1
        elif not self._is_plain:
            self._send_badly(way, message)
        elif way.sent_at == self._loop.now:
            way.messages.append(message)
        else:  # everything takes equally long, so nothing overtakes
            way.sent_at, way.messages = self._loop.now, [message]
            self._loop.after(self.config.latency_ns, self._deliver, way, way.messages)

    def _send_badly(self, way: _Way, message: Any) -> None:
        spared = isinstance(message, _SPARED)
        if not spared and self._chance(self.config.loss):
            self.num_lost += 1
            return
        self._send_once(way, message)
        if not spared and self._chance(self.config.repeat):
            self.num_repeated += 1
            delay = self._rng.randrange(self.config.delay_ns)
            self._loop.after(delay, self._send_once, way, message)

    # ------------------------------------------------------------------ inside

    def _heal(self, pair: tuple[str, str]) -> None:
        self._cuts[pair] -= 1
        if not self._cuts[pair]:
            del self._cuts[pair]

    def _try(self, dialler: str, acceptor: str) -> None:
        if (dialler, acceptor) not in self._dials or dialler not in self._peers:
            return
        old = self._streams.get(_pair(dialler, acceptor))
        if old is not None and old.ends == (dialler, acceptor) and (old.pending or dialler in old.hears):
            return
        if acceptor not in self._peers or not self.reachable(dialler, acceptor):
            self._loop.after(self.config.redial_ns, self._try, dialler, acceptor)
            return
        stream = self._streams[_pair(dialler, acceptor)] = _Stream(dialler, acceptor)
        if old is not None:
            old.hears.clear()
            self._ways.pop((dialler, acceptor), None)
            self._ways.pop((acceptor, dialler), None)
        self._loop.after(self._latency(), self._open, stream)

    def _open(self, stream: _Stream) -> None:
        if not self._is_current(stream):
            return
        stream.pending = False
        stream.hears = dict.fromkeys(stream.ends)
        dialler, acceptor = stream.ends
        for sender, receiver in ((dialler, acceptor), (acceptor, dialler)):
            self._ways[sender, receiver] = _Way(stream, sender, receiver)
        self._peers[acceptor].opened(dialler)
        self._peers[dialler].opened(acceptor)

    def _is_current(self, stream: _Stream) -> bool:
        return self._streams.get(_pair(*stream.ends)) is stream

    def _break(self, stream: _Stream, notice_ns: int) -> None:
        if stream.pending:  # nobody knows of it yet
            del self._streams[_pair(*stream.ends)]
        for end in stream.ends:
            self._loop.after(notice_ns, self._notice, stream, end)

    def _notice(self, stream: _Stream, end: str) -> None:
        dialler, acceptor = stream.ends
        if end in stream.hears:
            self._deafen(stream, end)
            if not stream.hears and self._is_current(stream):
                del self._streams[_pair(dialler, acceptor)]
            if end in self._peers:
                self._peers[end].gone(acceptor if end == dialler else dialler)
        if end == dialler:
            self._loop.after(self.config.redial_ns, self._try, dialler, acceptor)

    def _deafen(self, stream: _Stream, end: str) -> None:
        """That end neither hears nor speaks through the stream any more."""
        if end in stream.hears:
            del stream.hears[end]
            one, other = stream.ends
            self._ways.pop((end, other if end == one else one), None)

    def _send_once(self, way: _Way, message: Any) -> None:
        stream, receiver = way.stream, way.receiver
        if receiver not in stream.hears:
            return
        arrives = self._loop.now + self._latency()
        if self._chance(self.config.delay):
            arrives += self._rng.randrange(self.config.delay_ns)
        if not self.config.reorder:
            arrives = stream.last_at[receiver] = max(arrives, stream.last_at[receiver])
        self._loop.at(arrives, self._deliver, way, [message])

    def _deliver(self, way: _Way, messages: list[Any]) -> None:
        if way.messages is messages:
            way.sent_at = -1  # without latency, more may be sent at this very time
        peer = self._peers.get(way.receiver)
        if peer is not None and way.receiver in way.stream.hears:
            peer.received(way.sender, messages)

    def _latency(self) -> int:
        jitter = self.config.jitter_ns
        return self.config.latency_ns + (int(self._rng.expovariate(1 / jitter)) if jitter else 0)

    def _chance(self, share: float) -> bool:
        return share > 0 and self._rng.random() < share
