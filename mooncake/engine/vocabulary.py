"""What a model's tokens stand for, from the tokenizer.json of its folder and the files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from mooncake.core.errors import ModelError

_HEX_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """special: ids of tokens that text never contains, such as marks of turns. added: those and others that were added to what
    was learnt. byte_level: whether tokens are bytes in GPT-2's alphabet."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        self.size: int = library.get_vocab_size(with_added_tokens=True)
        added = library.get_added_tokens_decoder()
        self.added = frozenset(added)
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_level = isinstance(library.decoder, decoders.ByteLevel)
        self._byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Raises ModelError naming the file that is missing or unreadable."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"the model folder {folder} has no tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"cannot read {path}: {error}") from error

    def token_bytes(self, token_id: int) -> bytes:
        """A token by itself, special ones included, as log probabilities show it."""
        token: str = self.library.id_to_token(token_id) or ""
        if token_id in self.added:
            return token.encode()
        if self.byte_level:
            return self.text_bytes(token_id)
        match = _HEX_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace("\u2581", " ").encode()

    def text_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text. Of one that is not byte-level, in the middle of a text."""
        if not self.byte_level:
            return self.token_bytes(token_id)
        token: str = self.library.id_to_token(token_id) or ""
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:  # an added token with characters outside the byte alphabet stands for itself
            return token.encode()


def read_json(path: Path) -> dict[str, Any]:
    """An absent file is an empty one: most of them are optional. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return value


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and its like, written as text or as an object with its text in `content`."""
    tokens = {}
    for name, value in read_json(folder / "tokenizer_config.json").items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def eos_ids(folder: Path, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The tokens that end a text, by the model's configuration, else by the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if isinstance(eos, int):
            return (eos,)
        if isinstance(eos, list) and eos:
            return tuple(eos)
    eos_id = vocabulary.library.token_to_id(special_tokens(folder).get("eos_token", ""))
    return () if eos_id is None else (eos_id,)


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
