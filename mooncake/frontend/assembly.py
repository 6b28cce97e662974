"""From tokens to text: detokenise, find stops, count. Pure; one `Assembly` per choice, `Assemblies` for a request."""

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
    choice: int = 0


class Assembly:
    """finish: set once the choice has ended; by a stop string before the backend says so."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        stop_token_ids: Sequence[int],
        min_tokens: int,
        choice: int = 0,
        *,
        keeps_stop: bool = False,
    ) -> None:
        self.choice = choice
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops, keeps_match=keeps_stop) if stops else None
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
                    deltas.append(Delta(self._text(token_id), logprobs, self.choice))
                elif logprobs:
                    deltas.append(Delta("", logprobs, self.choice))
                if self.finish is not None:
                    return deltas
            if output.finish is not None:
                rest = self._end(output.finish)
                if rest:
                    deltas.append(Delta(rest, choice=self.choice))
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


class Assemblies:
    """The choices of one request, prompt by prompt. per_prompt: how many each has. num_tokens: of all. running: those that have
    not ended."""

    def __init__(self, assemblies: Sequence[Assembly], per_prompt: int) -> None:
        self.running = list(assemblies)
        self._per_prompt = per_prompt
        self.num_tokens = 0
        self._all = assemblies

    def take(self, outputs: Sequence[TokenOutput]) -> tuple[list[Delta], list[Assembly]]:
        """The deltas of all choices, each choice's in order; and the choices that ended."""
        if len(self._all) == 1:  # the rule, and the path of every token
            deltas = self._all[0].take(outputs) if self.running else []
            self.num_tokens = self._all[0].num_tokens
        else:
            deltas = self._take_apart(outputs)
            self.num_tokens = sum(assembly.num_tokens for assembly in self._all)
        ended = [assembly for assembly in self.running if assembly.finish is not None]
        if ended:
            self.running = [assembly for assembly in self.running if assembly.finish is None]
        return deltas, ended

    @property
    def cached_tokens(self) -> int:
        """Of all prompts; the choices of one share it."""
        cached = [assembly.cached_tokens for assembly in self._all]
        return sum([max(cached[at : at + self._per_prompt]) for at in range(0, len(cached), self._per_prompt)])

    def _take_apart(self, outputs: Sequence[TokenOutput]) -> list[Delta]:
        by_choice: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            by_choice.setdefault(output.key.choice, []).append(output)
        running = (assembly for assembly in self.running if assembly.choice in by_choice)
        return [delta for assembly in running for delta in assembly.take(by_choice[assembly.choice])]


def merge(deltas: Sequence[Delta]) -> list[Delta]:
    """One for each choice that is among them."""
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice, []).append(delta)
    return [
        Delta("".join(d.text for d in own), tuple(entry for d in own for entry in d.logprobs), choice)
        for choice, own in by_choice.items()
    ]
