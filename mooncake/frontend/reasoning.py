"""Reasoning apart from the answer, of models that write it between <think> and </think>.

Some chat templates open the block in the prompt; then the answer begins inside of it. White space around the reasoning, and
before the answer that follows it, belongs to neither."""

from __future__ import annotations

from collections.abc import Callable

from mooncake.frontend.parts import Part, PartParser, Reasoning
from mooncake.frontend.stops import open_tail

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """inner: parses what comes after the reasoning. opened: whether the answer begins inside of the block."""

    def __init__(self, inner: PartParser, opened: bool) -> None:
        self._inner = inner
        self._text = ""
        self._begun = False
        self._step: Callable[[], list[Part]] = self._inside if opened else self._before

    @property
    def num_calls(self) -> int:
        return self._inner.num_calls

    def push(self, text: str) -> list[Part]:
        self._text += text
        return self._step()

    def flush(self) -> list[Part]:
        text, self._text = self._text, ""
        if self._step == self._inside:  # the end of what may be a mark, or white space that nothing follows
            rest = text.rstrip()
            return [Reasoning(rest)] if rest else []
        return self._inner.push(text) + self._inner.flush()

    def _before(self) -> list[Part]:
        text = self._text.lstrip()
        if text.startswith(OPEN):
            self._text = text[len(OPEN) :]
            self._step = self._inside
        elif not OPEN.startswith(text):
            self._step = self._after
        else:
            return []
        return self._step()

    def _inside(self) -> list[Part]:
        text = self._text if self._begun else self._text.lstrip()
        end = text.find(CLOSE)
        if end >= 0:
            self._step = self._between
            rest, self._text = text[:end].rstrip(), text[end + len(CLOSE) :]
            parts: list[Part] = [Reasoning(rest)] if rest else []
            return parts + self._step()
        certain = text[: open_tail(text, (CLOSE,))].rstrip()
        self._text = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return [Reasoning(certain)] if certain else []

    def _between(self) -> list[Part]:
        self._text = self._text.lstrip()
        if not self._text:
            return []
        self._step = self._after
        return self._step()

    def _after(self) -> list[Part]:
        text, self._text = self._text, ""
        return self._inner.push(text)
