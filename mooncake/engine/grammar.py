"""Grammars that an output follows token by token, by llguidance.

A grammar travels as text, in that library's dialect of Lark, so that whoever continues a sequence can build its state again
from the tokens so far. JSON schemas, regular expressions and texts become such grammars by the functions below.

JSON is written on one line, as Python's json.dumps does: `, ` and `: `, no other space. A weak model that may put any amount of
space between two words may never come to an end.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import llguidance
import numpy as np

from mooncake.engine.vocabulary import Vocabulary, eos_ids

GRAMMAR_BYTES_MAX = 128 * 1024
_MULTIPLE_MAX = 1000
"""A multiple of n is found by an automaton with n states, which the library does not bound."""
_LIMITS = llguidance.LLParserLimits(
    max_grammar_size=50_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_items_in_row=1000,
    max_lexer_states=10_000,
    verbose_errors=False,
)
"""Of work and memory for one grammar and one step: some ten milliseconds, twenty megabytes. What needs more is refused."""
_COMPILED_MAX = 32
"""Grammars kept, as clients ask for the same ones again."""
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([-+.0-9eE]+)')


class Matcher:
    """Where one sequence is in its grammar. fault: why it cannot be followed (any more), else empty."""

    __slots__ = ("_inner", "_mask", "fault")

    def __init__(self, inner: llguidance.LLMatcher | None, num_tokens: int, fault: str = "") -> None:
        self._inner = inner
        self._mask = np.empty((num_tokens + 31) // 32, dtype=np.int32)
        self.fault = fault

    def forbid(self, logits: np.ndarray) -> None:
        """Minus infinity for all tokens that may not come next; ends of the text may where the grammar is complete."""
        allowed = self.allowed()
        if allowed is None:
            return
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")[: len(logits)].view(np.bool_)
        logits[: len(bits)][~bits] = -np.inf
        logits[len(bits) :] = -np.inf

    def allowed(self) -> np.ndarray | None:
        """Tokens that may come next, as bits, the lowest first: int32 of shape (ceil(tokens / 32),), good until the next call.
        None if there is a fault."""
        if self._inner is None or self.fault:
            return None
        self._inner.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._inner.is_error():
            self._fail()
            return None
        if not self._mask.any():
            self.fault = "the grammar allows no token here"
            return None
        return self._mask

    def advance(self, token: int) -> None:
        if self._inner is not None and not self.fault and not self._inner.consume_token(token):
            self._fail()

    def num_valid(self, tokens: Sequence[int]) -> int:
        """How many of them could come next, one after the other."""
        if self._inner is None or self.fault:
            return 0
        found: int = self._inner.validate_tokens(list(tokens))
        return found

    def go_back(self, num_tokens: int) -> None:
        """Forget the last tokens that it advanced by."""
        if self._inner is not None and not self.fault and not self._inner.rollback(num_tokens):
            self._fail()

    def copy(self) -> Matcher:
        inner = None if self._inner is None else self._inner.deep_copy()
        return Matcher(inner, 32 * len(self._mask), self.fault)

    def _fail(self) -> None:
        assert self._inner is not None
        self.fault = _first_line(self._inner.get_error()) or "the grammar cannot be followed"


class Grammars:
    """Compiles grammars for the tokens of one model. To be used by one thread.

    num_tokens: columns of the logits, which may be more than the vocabulary has. ends: tokens that end a text."""

    def __init__(self, vocabulary: Vocabulary, num_tokens: int, ends: Sequence[int]) -> None:
        self.num_tokens = num_tokens
        table = _TokenTable(vocabulary, num_tokens, ends[0] if ends else 0)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(table), eos_token=list(ends) or None)
        table.greedy = self._tokenizer
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()

    @classmethod
    def load(cls, folder: Path, num_tokens: int = 0) -> Grammars:
        """Raises ModelError."""
        vocabulary = Vocabulary.load(folder)
        return cls(vocabulary, max(num_tokens, vocabulary.size), eos_ids(folder, vocabulary))

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of that grammar. Never raises: a grammar that is wrong has a fault."""
        matcher = self._compiled.pop(grammar, None) or self._compile(grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > _COMPILED_MAX:
            self._compiled.popitem(last=False)
        return matcher.copy()

    def _compile(self, grammar: str) -> Matcher:
        fault = _too_much(grammar)
        if fault:
            return Matcher(None, self.num_tokens, fault)
        inner = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        matcher = Matcher(inner, self.num_tokens, _first_line(inner.get_error()))
        matcher.forbid(np.zeros(self.num_tokens, dtype=np.float32))  # some faults show with the first step only
        return matcher


class _TokenTable:
    """What llguidance asks of a tokenizer. Its own reader of tokenizer.json takes tokens such as <think> for special ones."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, num_tokens: int, eos_id: int) -> None:
        self.greedy: llguidance.LLTokenizer | None = None
        self.eos_token_id = eos_id
        self.tokens = [vocabulary.text_bytes(token) for token in range(vocabulary.size)]
        # Columns without a token stand for bytes that no text has.
        self.tokens += [b"\xfe%d" % token for token in range(vocabulary.size, num_tokens)]
        self.special_token_ids = sorted(vocabulary.special)
        self._vocabulary = vocabulary

    def __call__(self, text: str | bytes) -> list[int]:
        """How the model is used to see a text that the grammar leaves no choice about. Any other way of cutting it is right
        too, and is taken where the usual one brings special tokens or other bytes."""
        data = text if isinstance(text, bytes) else text.encode()
        tokens: list[int] = self._vocabulary.library.encode(data.decode(), add_special_tokens=False).ids
        if not self._vocabulary.special.intersection(tokens) and b"".join(self.tokens[i] for i in tokens) == data:
            return tokens
        return [] if self.greedy is None else self.greedy.greedy_tokenize(data.decode())


def json_grammar(schema: dict[str, Any], *, strict: bool) -> str:
    return f"start: {json_value(schema, strict=strict)}"


def regex_grammar(pattern: str) -> str:
    return f"start: /{llguidance.regex_to_lark(pattern)}/"


def choice_grammar(texts: Sequence[str]) -> str:
    return f"start: /(?:{'|'.join(map(escape, texts))})/"


def json_value(schema: dict[str, Any], *, strict: bool) -> str:
    """A JSON value as a term of a rule. strict: keywords of the schema that cannot be followed are faults; otherwise they are
    passed over."""
    styled = schema | {"x-guidance": _JSON_STYLE | {"lenient": not strict}}
    return f"%json {json.dumps(styled, ensure_ascii=False)}"


def literal(text: str) -> str:
    """A text as a term of a rule."""
    return f"/{escape(text)}/"


def nested(grammar: str) -> str:
    """A whole grammar as a term of a rule."""
    return f"%lark {{\n{grammar}\n}}"


def escape(text: str) -> str:
    """For a regular expression between slashes, whatever is in the text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _too_much(grammar: str) -> str:
    """Why the library must not see this grammar, or nothing."""
    if len(grammar.encode()) > GRAMMAR_BYTES_MAX:
        return f"the grammar has more than {GRAMMAR_BYTES_MAX} bytes"
    for match in _MULTIPLE.finditer(grammar):
        if _states(match[1]) > _MULTIPLE_MAX:
            return f"multipleOf {match[1]}: more than {_MULTIPLE_MAX}, without the decimal point, is too much work"
    return ""


def _states(number: str) -> Decimal:
    try:
        _, digits, exponent = Decimal(number).normalize().as_tuple()
    except InvalidOperation:
        return Decimal(0)  # no JSON; the library says so
    return Decimal((0, digits, max(0, int(exponent))))


def _first_line(error: str) -> str:
    """Without the place, which means nothing to who did not write the grammar's text."""
    return re.sub(r"^(at )?\d+\(\d+\): ", "", error.partition("\n")[0])
