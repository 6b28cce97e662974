"""What the text of an answer consists of, and the parser of an answer that is text only."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True):
    text: str


class Reasoning(msgspec.Struct, frozen=True):
    text: str


class CallBegun(msgspec.Struct, frozen=True):
    """The index-th call of the answer."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of the call's arguments."""

    index: int
    text: str


Part = Content | Reasoning | CallBegun | CallArguments


class PartParser(Protocol):
    """Text that comes in pieces, to parts. However it is cut, the texts of each kind are the same when they are joined."""

    @property
    def num_calls(self) -> int:
        """Of tools, so far."""
        ...

    def push(self, text: str) -> list[Part]: ...

    def flush(self) -> list[Part]:
        """What was held back, at the end."""
        ...


class TextParser:
    num_calls = 0

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def flush(self) -> list[Part]:
        return []
