"""Reads vLLM's KV events over ZMQ, and asks again for those that were missed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from mooncake.engine.vllm.events import CachedBlocks, EventOrder, Keys, decode_batch

log = logging.getLogger(__name__)

REPLAY_S = 1.0
"""How long the publisher may take to send the next batch that it was asked for again."""
_NUMBER_BYTES = 8
_END = -1


class EventFeed:
    """blocks: what is cached as far as was told. on_change(added, removed) is called from the event loop."""

    def __init__(
        self, endpoint: str, replay_endpoint: str, blocks: CachedBlocks, on_change: Callable[[Keys, Keys], None]
    ) -> None:
        self.blocks = blocks
        self._replay_endpoint = replay_endpoint
        self._on_change = on_change
        self._order = EventOrder()
        self._context = zmq.asyncio.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.setsockopt(zmq.SUBSCRIBE, b"")
        self._events.connect(endpoint)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                frames = await self._events.recv_multipart()
                if len(frames) != 3 or len(frames[1]) != _NUMBER_BYTES:
                    log.warning("a message on the socket of KV events is none")
                    continue
                await self._take(int.from_bytes(frames[1], "big"), frames[2])
        finally:
            self._context.destroy(linger=0)

    async def _take(self, number: int, payload: bytes) -> None:
        if self._order.began_anew(number):
            self._forget()
        elif self._order.missing(number):
            await self._fill_gap(number)
        if self._order.take(number):
            self._apply(payload)

    async def _fill_gap(self, number: int) -> None:
        for missed, payload in await self._replay(self._order.next):
            if missed >= number:
                break
            self._forget_if_lost(missed)
            if self._order.take(missed):
                self._apply(payload)
        self._forget_if_lost(number)

    async def _replay(self, first: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        with self._context.socket(zmq.DEALER) as asked:
            asked.setsockopt(zmq.LINGER, 0)
            asked.connect(self._replay_endpoint)
            await asked.send_multipart((b"", first.to_bytes(_NUMBER_BYTES, "big")))
            try:
                while True:
                    *_, number, payload = await asyncio.wait_for(asked.recv_multipart(), REPLAY_S)
                    if int.from_bytes(number, "big", signed=True) == _END:
                        return found
                    found.append((int.from_bytes(number, "big"), payload))
            except TimeoutError:
                return found

    def _apply(self, payload: bytes) -> None:
        try:
            added, removed = self.blocks.apply(decode_batch(payload))
        except ValueError as error:
            log.warning("%s", error)
            return
        if added or removed:
            self._on_change(added, removed)

    def _forget_if_lost(self, number: int) -> None:
        """Nobody has what comes before that batch any more."""
        if self._order.missing(number):
            log.warning("KV events %d to %d are lost; what is cached is learnt anew", self._order.next, number - 1)
            self._forget()

    def _forget(self) -> None:
        removed = self.blocks.forget()
        if removed:
            self._on_change((), removed)
