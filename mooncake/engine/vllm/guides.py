"""Grammars for vLLM: each guided request of our services gets a `Guide`, in vLLM's scheduler.

vLLM compiles a grammar when a request comes, and begins it with the first token that the request generates. A sequence that
goes on elsewhere is, for vLLM, a prompt; its grammar must begin where its last token left it. So vLLM is given a grammar that
any text follows, and the guide takes its place before the request is scheduled: the same library, limits and reading of tokens
as with our torch engine. Guides only tell which tokens may come next, which vLLM asks for in one place for all its runners.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mooncake.engine.grammar import Grammars, Matcher


class Guide:
    """Where one request is in its grammar: what vLLM asks of a StructuredOutputGrammar. What cannot be followed (any more) is
    not masked, and the request ends with the next token."""

    def __init__(self, matcher: Matcher, generated: Sequence[int]) -> None:
        self._matcher = matcher
        for token in generated:
            matcher.advance(token)

    @property
    def fault(self) -> str:
        """Why the grammar cannot be followed, or nothing."""
        return self._matcher.fault

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            self._matcher.advance(token)
        return not self.fault

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens[: self._matcher.num_valid(tokens)]

    def rollback(self, num_tokens: int) -> None:
        self._matcher.go_back(num_tokens)

    def fill_bitmask(self, bitmask: Any, index: int) -> None:
        """bitmask: a tensor of int32 on the host, a row for each request, in which each bit is a token."""
        row = bitmask[index].numpy()
        allowed = self._matcher.allowed()
        if allowed is None:
            row[:] = -1
        else:
            num_words = min(len(row), len(allowed))
            row[:num_words] = allowed[:num_words]
            row[num_words:] = 0

    def is_terminated(self) -> bool:
        """Never: where nothing else may come, the ends of the text still have to be asked for."""
        return False


class Guides:
    """Makes guides, in a thread of their own: a large grammar takes longer than a step. Used by vLLM's scheduler, which has no
    more requests than it was given, and asks for each again and again until its guide is there."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        self._folder = folder
        self._num_tokens = num_tokens
        self._grammars: Grammars | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._made: dict[str, Future[Guide]] = {}

    def take(self, request: str, grammar: str, generated: Sequence[int]) -> Guide | None:
        """generated: the tokens at the end of the request's prompt that follow the grammar already. None: ask again."""
        made = self._made.get(request)
        if made is None:
            made = self._made[request] = self._thread.submit(self._make, grammar, generated)
        if not made.done():
            return None
        del self._made[request]
        error = made.exception()
        if error is not None:
            return Guide(Matcher(None, self._num_tokens, f"no grammar can be followed here: {error}"), ())
        return made.result()

    def forget(self, request: str) -> None:
        """It ended, perhaps before it had a guide."""
        made = self._made.pop(request, None)
        if made is not None:
            made.cancel()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _make(self, grammar: str, generated: Sequence[int]) -> Guide:
        """Raises ModelError."""
        if self._grammars is None:
            self._grammars = Grammars.load(self._folder, self._num_tokens)
        return Guide(self._grammars.matcher(grammar), generated)
