"""Finds stop strings in text that arrives in pieces, and holds back what may become one.

The result does not depend on how the text is cut: the match that ends first wins, the longest of those. Nothing of a
match, unless that is wanted, and nothing after it is given out.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """keeps_match: the stop string that is found is given out too."""

    __slots__ = ("_held", "_keeps_match", "_stops", "hit")

    def __init__(self, stops: Sequence[str], *, keeps_match: bool = False) -> None:
        self._stops = tuple(stops)
        self._keeps_match = keeps_match
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that is certain to come before any stop string. After a hit: nothing more."""
        text = self._held + text
        cut = self._match(text)
        if cut is not None:
            self.hit, self._held = True, ""
            return text[:cut]
        cut = open_tail(text, self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text

    def _match(self, text: str) -> int | None:
        """Where the match that ends first begins, or ends if it is kept."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[not self._keeps_match]


def open_tail(text: str, stops: Sequence[str]) -> int:
    """Start of the longest tail that is the beginning of a stop string; the text's end if there is none."""
    cut = len(text)
    for stop in stops:
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1), cut)
        while start >= 0:
            if stop.startswith(text[start:]):
                cut = start
                break
            start = text.find(stop[0], start + 1, cut)
    return cut
