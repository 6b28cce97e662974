"""Remembering objects that are gone."""

from __future__ import annotations

from typing import Generic, TypeVar

_T = TypeVar("_T")

GHOSTS_MAX = 1 << 20
"""Of a policy, about 200 MB. Reached by stores of a million objects or more."""


class Ghosts(Generic[_T]):
    """The latest keys that were remembered, between once and twice as many as wanted: a young and an old half, of which the old
    one is dropped whole. So nothing is ever searched for the oldest one."""

    def __init__(self) -> None:
        self._young: dict[bytes, _T] = {}
        self._old: dict[bytes, _T] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def remember(self, key: bytes, value: _T, wanted: int) -> None:
        """wanted: how many keys, this one included, should be remembered."""
        if len(self._young) >= min(wanted, GHOSTS_MAX // 2):
            self._old, self._young = self._young, {}
        self._young[key] = value

    def recall(self, key: bytes) -> _T | None:
        """What was remembered of it, which is forgotten now."""
        found = self._young.pop(key, None)
        return self._old.pop(key, None) if found is None else found
