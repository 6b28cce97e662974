"""Readers who find and lease objects without asking the node, as the store core sees them.

The core tells them what can be read, and asks before it gives space to somebody else. Their answers are not the core's to
foresee: an event log keeps them beside the event during which they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mooncake.store.objects import Objects

Answers = tuple[tuple[int, tuple[int, ...]], ...]
"""Of the questions that came during an event: the place of each that was not answered with nothing, and the answer."""


class Readers(Protocol):
    def publish(self, objects: Objects, rows: Sequence[int]) -> None:
        """These can be read from now on."""
        ...

    def withdraw(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        """Nobody finds these any more, published or not. Those that are being read, in the same order."""
        ...

    def reading(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        """Those of these that are being read."""
        ...


class NoReaders:
    """Everybody asks: a simulated node, or a processor on which the read path does not work."""

    def publish(self, objects: Objects, rows: Sequence[int]) -> None:
        pass

    def withdraw(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        return ()

    def reading(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        return ()


class RecordedReaders(NoReaders):
    """Answers as an event log says; `answers` is set before each event."""

    def __init__(self) -> None:
        self._answers: dict[int, tuple[int, ...]] = {}
        self._num_asked = 0

    def begin(self, answers: Answers) -> None:
        self._answers = dict(answers)
        self._num_asked = 0

    def withdraw(self, objects: Objects, rows: Sequence[int]) -> Sequence[int]:
        self._num_asked += 1
        return self._answers.get(self._num_asked - 1, ())

    reading = withdraw
