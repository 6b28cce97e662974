"""Text to token ids and back: `tokenizers` for the vocabulary, jinja2 for the chat template, from the model's folder.

Detokenisation is incremental and exact: what `push` gives, joined, plus `flush`, is the full decode. A byte-level
vocabulary (GPT-2, Llama 3, Qwen, SmolLM) is a table from token to bytes, and UTF-8 takes care of itself; that costs no
call into the library and holds back at most three bytes. Any other goes through the library's DecodeStream; there a run
of byte tokens that is not UTF-8 may give other replacement characters than the full decode, which judges whole runs.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders

from mooncake.core.errors import ModelError, MooncakeError
from mooncake.engine.vocabulary import Vocabulary, eos_ids, read_json, special_tokens


class TemplateFailed(MooncakeError):
    """The chat template refuses these messages, or there is none; the message is for the client."""


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is incomplete and for special tokens."""
        ...

    def flush(self) -> str:
        """The rest, at the end: replacement characters for incomplete ones."""
        ...


class _TokenBytes(dict[int, bytes]):
    """Bytes of each token of a byte-level vocabulary, filled as tokens are met. Unknown and special ones have none."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> bytes:
        data = b"" if token_id in self._vocabulary.special else self._vocabulary.text_bytes(token_id)
        self[token_id] = data
        return data


class _ByteDetokenizer:
    __slots__ = ("_decode", "_table")

    def __init__(self, table: _TokenBytes) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._table[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class _StreamDetokenizer:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_chars = 0

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._num_chars += len(text)
        return text

    def flush(self) -> str:
        return self._tokenizer.decode(self._token_ids, skip_special_tokens=True)[self._num_chars :]


class _ShowingDetokenizer:
    """Around each special token that is shown, a text of its own."""

    def __init__(self, make: Callable[[], Detokenizer], shown: Mapping[int, str]) -> None:
        self._make = make
        self._shown = shown
        self._inner = make()

    def push(self, token_id: int) -> str:
        mark = self._shown.get(token_id)
        if mark is None:
            return self._inner.push(token_id)
        text = self._inner.flush() + mark
        self._inner = self._make()
        return text

    def flush(self) -> str:
        return self._inner.flush()


class Tokenizer:
    """A model's tokenizer. Not changed after construction; `encode` may be called from several threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._template = None if chat_template is None else _compile(chat_template)
        self.chat_template = chat_template or ""
        self.eos_ids = tuple(eos_ids)
        self.vocabulary = Vocabulary(tokenizer)
        self.vocab_size = self.vocabulary.size
        self._table = _TokenBytes(self.vocabulary) if self.vocabulary.byte_level else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises ModelError naming the file that is missing or unreadable."""
        vocabulary = Vocabulary.load(folder)
        return cls(
            vocabulary.library,
            chat_template=_chat_template(folder),
            special_tokens=special_tokens(folder),
            eos_ids=eos_ids(folder, vocabulary),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Unlike the library's `encode` this releases the GIL, and it is twice as fast, as it computes no offsets."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, shown: Mapping[int, str] | None = None) -> Detokenizer:
        """shown: special tokens that are part of the text here, with what they look like."""
        if shown:
            return _ShowingDetokenizer(self.detokenizer, shown)
        return _StreamDetokenizer(self._tokenizer) if self._table is None else _ByteDetokenizer(self._table)

    def token_bytes(self, token_id: int) -> bytes:
        """A token by itself, special ones included, as log probabilities show it."""
        return self.vocabulary.token_bytes(token_id)

    def special_id(self, text: str) -> int | None:
        """The id of a special token."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id if token_id in self.vocabulary.special else None

    def render_chat(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation, ready for the assistant's turn. variables: others that the template may use.
        Raises TemplateFailed."""
        if self._template is None:
            raise TemplateFailed("the model has no chat template; use /v1/completions")
        words = self._special_tokens | variables
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **words)
        except Exception as error:  # a template is a program of the model's author: whatever it raises
            raise TemplateFailed(f"the model's chat template refuses the messages: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; for serving it is transparent."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]  # jinja2 declares it per instance

    def parse(self, parser: jinja2.parser.Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


def _compile(template: str) -> jinja2.Template:
    """The environment in which the transformers library runs chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the model's chat template has an error in line {error.lineno}: {error.message}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """jinja2's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _chat_template(folder: Path) -> str | None:
    """A file of its own wins over the configuration, where it is one template or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
