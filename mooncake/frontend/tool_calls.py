"""Calls of tools in a text that comes in pieces.

    outside --opening--> between --{--> object --}--> between --closing--> outside

A format without an opening begins between calls if the answer begins with an object or a list, and once something there is no
call, all is text. What turns out to be no call is text as it stands. White space before and between calls is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from mooncake.frontend.parts import CallArguments, CallBegun, Content, Part
from mooncake.frontend.stops import open_tail
from mooncake.frontend.tool_formats import ToolFormat

_HEAD_MAX = 1024
"""Characters of an object within which its arguments must begin, to be passed on before it is complete."""
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"\\]*)"|[^"\s])')
_CALL_KEYS = ("name", "arguments", "parameters", "id", "type")


class _Nesting:
    """Follows JSON text; finds where it comes back to a depth."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, text: str, start: int, depth: int) -> int:
        """Behind the bracket that leads back to that depth, or -1 after the end of the text."""
        for at in range(start, len(text)):
            char = text[at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == depth:
                    return at + 1
        return -1


class _Object:
    """One JSON object: a call, or not. text: all of it so far. rest: what came behind it.

    on_name(name): whether that is a call. on_arguments(piece). state: undecided, arguments, tail, call, other (no call)."""

    def __init__(self, on_name: Callable[[str], bool], on_arguments: Callable[[str], None]) -> None:
        self.text = ""
        self.rest = ""
        self.state = "undecided"
        self._on_name = on_name
        self._on_arguments = on_arguments
        self._nesting = _Nesting(0)
        self._at = 0

    def push(self, text: str) -> None:
        self.text += text
        if self.state == "undecided":
            self._decide()
        if self.state == "arguments":
            start = self._at
            self._follow(1, "tail")
            if self._at > start:
                self._on_arguments(self.text[start : self._at])
            self.text, self._at = self.text[self._at :], 0
        if self.state == "tail":
            self._follow(0, "call")

    def _decide(self) -> None:
        head = _HEAD.match(self.text, 0, _HEAD_MAX)
        if head is not None:
            name = _load(head[1])
            self.state = "arguments" if isinstance(name, str) and self._on_name(name) else "other"
            self._at, self._nesting = head.end(), _Nesting(1)
            return
        key = _FIRST_KEY.match(self.text)
        if key is not None and key[1] not in _CALL_KEYS:
            self.state = "other"
            return
        self._follow(0, "whole")
        if self.state == "whole":
            self.state = "call" if self._take_whole() else "other"

    def _follow(self, depth: int, then: str) -> None:
        end = self._nesting.find(self.text, self._at, depth)
        self._at = len(self.text) if end < 0 else end
        if end >= 0:
            self.state = then
            if depth == 0:
                self.text, self.rest = self.text[:end], self.text[end:]

    def _take_whole(self) -> bool:
        """A complete object whose keys come in another order, or with others between them."""
        found = _load(self.text)
        if not isinstance(found, dict):
            return False
        arguments: Any = found.get("arguments", found.get("parameters"))
        if not isinstance(found.get("name"), str) or not isinstance(arguments, str | dict):
            return False
        if not self._on_name(found["name"]):
            return False
        self._on_arguments(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        return True


def _load(text: str) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class CallParser:
    """names: of the tools there are. max_calls: later ones are dropped. new_id: draws the id of a call."""

    def __init__(self, form: ToolFormat, names: Collection[str], max_calls: int, new_id: Callable[[], str]) -> None:
        self.num_calls = 0
        self._form = form
        self._names = names
        self._max_calls = max_calls
        self._new_id = new_id
        self._text = ""
        self._space = ""
        """White space that is text only if text follows."""
        self._raw = ""
        """What was taken since the last text or call, in case that it is no call."""
        self._object = self._new_object()
        self._parts: list[Part] = []
        self._step: Callable[[], bool] = self._outside if form.opening else self._start

    def push(self, text: str) -> list[Part]:
        self._text += text
        while self._step():
            pass
        parts, self._parts = self._parts, []
        return parts

    def flush(self) -> list[Part]:
        if not self.num_calls:  # behind calls, what is held back is the beginning of one that was cut
            begun = self._object.text if self._step == self._in_object else ""
            self._add_text(self._raw + begun + self._text)
            if self._space:
                self._parts.append(Content(self._space))
        self._text = ""
        parts, self._parts = self._parts, []
        return parts

    # ------------------------------------------------------------ steps: whether the next one can be taken at once

    def _start(self) -> bool:
        """Of a format without an opening."""
        begin = self._text.lstrip()
        if not begin:
            return False
        self._step = self._between if begin[0] in "{[" else self._plain
        return True

    def _plain(self) -> bool:
        self._add_text(self._text)
        self._text = ""
        return False

    def _outside(self) -> bool:
        mark = self._form.opening
        at = self._text.find(mark)
        if at < 0:
            cut = open_tail(self._text, (mark,))
            self._add_text(self._text[:cut])
            self._text = self._text[cut:]
            return False
        self._add_text(self._text[:at])
        self._raw, self._text = mark, self._text[at + len(mark) :]
        self._step = self._between
        return True

    def _between(self) -> bool:
        text = self._text.lstrip(self._form.skipped)
        self._raw += self._text[: len(self._text) - len(text)]
        self._text = text
        closing = self._form.closing
        if not text:
            return False
        if text[0] == "{":
            self._object = self._new_object()
            self._step = self._in_object
        elif closing and text.startswith(closing):
            self._text = text[len(closing) :]
            self._leave(self._raw + closing)
        elif closing.startswith(text):
            return False
        else:
            self._leave(self._raw)
        return True

    def _in_object(self) -> bool:
        found = self._object
        found.push(self._text)
        self._text = ""
        if found.state == "call":
            self._raw, self._text = "", found.rest
            self._step = self._between
        elif found.state == "other":
            self._text = found.rest
            self._leave(self._raw + found.text)
        return found.state in ("call", "other")

    def _leave(self, raw: str) -> None:
        """Go on outside. raw: text, unless calls came before it and this is only their end, or its beginning."""
        rest = raw.lstrip(self._form.skipped)
        if not self.num_calls or not self._form.closing.startswith(rest):
            self._add_text(raw)
        self._raw = ""
        self._step = self._outside if self._form.opening else self._plain

    # ------------------------------------------------------------ parts

    def _add_text(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._parts.append(Content(kept))

    def _new_object(self) -> _Object:
        return _Object(self._begin, self._add_arguments)

    def _begin(self, name: str) -> bool:
        if not self._form.opening and name not in self._names:
            return False
        self._raw = self._space = ""
        self.num_calls += 1
        if self.num_calls <= self._max_calls:
            self._parts.append(CallBegun(self.num_calls - 1, self._new_id(), name))
        return True

    def _add_arguments(self, text: str) -> None:
        if self.num_calls <= self._max_calls:
            self._parts.append(CallArguments(self.num_calls - 1, text))
