"""From a choice's tokens to its text: detokenise, find stops, count. Pure; one instance per choice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mooncake.core.messages import TokenOutput
from mooncake.core.types import FinishReason, TokenLogprobs
from mooncake.frontend.stops import StopScanner
from mooncake.frontend.tokenizer import Detokenizer


class Delta(msgspec.Struct, gc=False):
    """Text that became certain with one token (or several, merged), and the log probabilities of these tokens.

    The text may be empty (inside a character or a possible stop string) and may be older than the token."""

    text: str
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()


class Assembly:
    """finish: set once the choice has ended; by a stop string before the backend says so."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], stop_token_ids: Sequence[int], min_tokens: int
    ) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops) if stops else None
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish: FinishReason | None = None

    def take(self, outputs: Sequence[TokenOutput]) -> list[Delta]:
        """One delta per token, but none for an end token. What follows a stop string is neither shown nor counted."""
        deltas: list[Delta] = []
        for output in outputs:
            if output.cached_tokens is not None and self.num_tokens == 0:
                self.cached_tokens = output.cached_tokens
            num_text = len(output.token_ids) - self._ends_with_stop_token(output)
            for index, token_id in enumerate(output.token_ids):
                self.num_tokens += 1
                logprobs = ((token_id, output.logprobs[index]),) if output.logprobs else ()
                if index < num_text:
                    deltas.append(Delta(self._text(token_id), logprobs))
                elif logprobs:
                    deltas.append(Delta("", logprobs))
                if self.finish is not None:
                    return deltas
            if output.finish is not None:
                rest = self._end(output.finish)
                if rest:
                    deltas.append(Delta(rest))
        return deltas

    def _ends_with_stop_token(self, output: TokenOutput) -> bool:
        stopped = output.finish is FinishReason.STOP and len(output.token_ids) > 0
        return stopped and output.token_ids[-1] in self._stop_token_ids

    def _text(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        if self._scanner is None or self.num_tokens <= self._min_tokens:
            return text
        return self._scan(self._scanner, text)

    def _scan(self, scanner: StopScanner, text: str) -> str:
        text = scanner.push(text)
        if scanner.hit:
            self.finish = FinishReason.STOP
        return text

    def _end(self, finish: FinishReason) -> str:
        """The text held back so far; it may still complete a stop string, which then is the reason."""
        self.finish = finish
        text = self._detokenizer.flush()
        if self._scanner is not None:
            text = self._scan(self._scanner, text) + self._scanner.flush()
        return text


def merge(deltas: Sequence[Delta]) -> Delta:
    return Delta("".join(d.text for d in deltas), tuple(entry for d in deltas for entry in d.logprobs))
