"""Text to token ids and back: `tokenizers` for the vocabulary, jinja2 for the chat template, from the model's folder.

Detokenisation is incremental and exact: what `push` gives, joined, plus `flush`, is the full decode. A byte-level
vocabulary (GPT-2, Llama 3, Qwen, SmolLM) is a table from token to bytes, and UTF-8 takes care of itself; that costs no
call into the library and holds back at most three bytes. Any other goes through the library's DecodeStream; there a run
of byte tokens that is not UTF-8 may give other replacement characters than the full decode, which judges whole runs.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
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

_HEX_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}

    def __missing__(self, token_id: int) -> bytes:
        data = b"" if token_id in self._special else self.raw(token_id)
        self[token_id] = data
        return data

    def raw(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:  # an added token with characters outside the byte alphabet stands for itself
            return token.encode()


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
        self.eos_ids = tuple(eos_ids)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._table = _TokenBytes(tokenizer, special) if byte_level else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises ModelError naming the file that is missing or unreadable."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"the model folder {folder} has no tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"cannot read {path}: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        eos_ids = _eos_ids(folder)
        if not eos_ids and "eos_token" in special_tokens:
            eos_id = tokenizer.token_to_id(special_tokens["eos_token"])
            eos_ids = () if eos_id is None else (eos_id,)
        template = _chat_template(folder, config)
        return cls(tokenizer, chat_template=template, special_tokens=special_tokens, eos_ids=eos_ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Unlike the library's `encode` this releases the GIL, and it is twice as fast, as it computes no offsets."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self) -> Detokenizer:
        return _StreamDetokenizer(self._tokenizer) if self._table is None else _ByteDetokenizer(self._table)

    def token_bytes(self, token_id: int) -> bytes:
        """A token by itself, special ones included, as log probabilities show it."""
        token = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            return token.encode()
        if self._table is not None:
            return self._table.raw(token_id)
        match = _HEX_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace("\u2581", " ").encode()

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt of a conversation, ready for the assistant's turn. Raises TemplateFailed."""
        if self._template is None:
            raise TemplateFailed("the model has no chat template; use /v1/completions")
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens)
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


def _read_json(path: Path) -> dict[str, Any]:
    """An absent file is an empty one: most of them are optional."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and its like, written as text or as an object with its text in `content`."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if isinstance(eos, int):
            return (eos,)
        if isinstance(eos, list):
            return tuple(eos)
    return ()


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own wins over the configuration, where it is one template or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte (GPT-2's table)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, next_char = [], 0x100
    for byte in range(256):
        if byte in plain:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(next_char))
            next_char += 1
    return alphabet
