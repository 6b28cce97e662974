"""What vLLM's KV events say of the blocks in its pages, in our keys.

A batch is msgpack, [time, events, data parallel rank], and has a number. Events are maps with a "type" in newer releases and
arrays that begin with it in older ones; both are read. Batches that were missed are asked for again; what nobody has any more
makes us forget all: a holder that is not known costs a copy, one that is not there a failed load.

vLLM names pages by hashes of its own, and tells the tokens in them. Our key of a block follows from the key before it and its
tokens; that of a sequence's first block is told by the request's salt, which our services set to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from mooncake.core.keys import KEY_BYTES, block_keys

Hash = bytes | int
Keys = tuple[bytes, ...]

_STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
)
_REMOVED = ("block_hashes", "medium")
_OWN_MEMORY = (None, "GPU", "CPU")
"""Media of the pages themselves; what lies elsewhere is reported by whoever owns it."""


class Stored(msgspec.Struct, frozen=True):
    """Pages that follow `parent`. extras: by page, what beside the tokens is in its hash."""

    hashes: tuple[Hash, ...]
    parent: Hash | None
    token_ids: tuple[int, ...]
    page_tokens: int
    extras: tuple[tuple[Any, ...], ...] = ()


class Removed(msgspec.Struct, frozen=True):
    hashes: tuple[Hash, ...]


class Cleared(msgspec.Struct, frozen=True):
    pass


KvEvent = Stored | Removed | Cleared


def decode_batch(payload: bytes) -> list[KvEvent]:
    """Events of kinds or media that we do not know are passed over. Raises ValueError for what is no batch."""
    try:
        batch = msgspec.msgpack.decode(payload)
        found = [_event(raw) for raw in batch[1]]
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise ValueError(f"no batch of KV events: {error}") from error
    return [event for event in found if event is not None]


def _event(raw: Any) -> KvEvent | None:
    kind, fields = (raw["type"], raw) if isinstance(raw, dict) else (raw[0], _named(raw[0], raw[1:]))
    if fields.get("medium") not in _OWN_MEMORY:
        return None
    if kind == "BlockStored":
        extras = tuple(tuple(each or ()) for each in fields.get("extra_keys") or ())
        hashes, tokens = tuple(fields["block_hashes"]), tuple(fields["token_ids"])
        return Stored(hashes, fields["parent_block_hash"], tokens, fields["block_size"], extras)
    if kind == "BlockRemoved":
        return Removed(tuple(fields["block_hashes"]))
    return Cleared() if kind == "AllBlocksCleared" else None


def _named(kind: str, values: Sequence[Any]) -> dict[str, Any]:
    names = {"BlockStored": _STORED, "BlockRemoved": _REMOVED}.get(kind, ())
    return dict(zip(names, values, strict=False))


class EventOrder:
    """Which batches come next, and which are missing. Numbers begin with 0; a smaller one than was seen is a repetition, but 0
    after others is a publisher that began anew."""

    def __init__(self) -> None:
        self.next = 0

    def missing(self, number: int) -> bool:
        """Whether some come before that one."""
        return number > self.next

    def take(self, number: int) -> bool:
        """Whether to apply it, if nothing else is to be had before it."""
        if number < self.next and number:
            return False
        self.next = number + 1
        return True

    def began_anew(self, number: int) -> bool:
        return number == 0 and self.next > 0


class _Page:
    """pages: of its block, up to it. tokens: in these. before: key of the block before, None in the first of a sequence. key:
    of the block that ends here, if it does."""

    __slots__ = ("before", "first_key", "key", "pages", "tokens")

    def __init__(
        self, before: bytes | None, first_key: bytes | None, pages: tuple[Hash, ...], tokens: tuple[int, ...]
    ) -> None:
        self.before = before
        self.first_key = first_key
        self.pages = pages
        self.tokens = tokens
        self.key: bytes | None = None

    def end_block(self, block_tokens: int) -> None:
        if self.before is None:
            self.key = self.first_key
        else:
            [self.key] = block_keys(self.before, self.tokens, block_tokens)


class CachedBlocks:
    """Blocks all of whose pages vLLM has."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._pages: dict[Hash, _Page] = {}
        self._blocks: dict[bytes, tuple[Hash, ...]] = {}
        self._key_of: dict[Hash, bytes] = {}
        """By each page of a cached block."""

    def keys(self) -> Keys:
        return tuple(self._blocks)

    def apply(self, events: Iterable[KvEvent]) -> tuple[Keys, Keys]:
        """Keys (added, removed); one that came and went is in neither."""
        was: dict[bytes, bool] = {}
        for event in events:
            if isinstance(event, Stored):
                for key in self._store(event):
                    was.setdefault(key, False)
            else:
                for key in self._remove(event.hashes) if isinstance(event, Removed) else self.forget():
                    was.setdefault(key, True)
        added = tuple(key for key, before in was.items() if not before and key in self._blocks)
        return added, tuple(key for key, before in was.items() if before and key not in self._blocks)

    def forget(self) -> Keys:
        """All; gives their keys."""
        keys = self.keys()
        self._pages.clear()
        self._blocks.clear()
        self._key_of.clear()
        return keys

    def _store(self, event: Stored) -> list[bytes]:
        """Keys of blocks that were not cached before."""
        found: list[bytes] = []
        parent, size = event.parent, event.page_tokens
        for at, name in enumerate(event.hashes):
            if name not in self._pages:
                extras = event.extras[at] if at < len(event.extras) else ()
                page = self._page(name, parent, event.token_ids[at * size : (at + 1) * size], extras)
                if page is None:
                    break  # it follows what we have not heard of
                self._pages[name] = page
            page = self._pages[name]
            if (
                page.key is not None
                and page.key not in self._blocks
                and all(each in self._pages for each in page.pages)
            ):
                self._blocks[page.key] = page.pages
                self._key_of.update(dict.fromkeys(page.pages, page.key))
                found.append(page.key)
            parent = name
        return found

    def _page(self, name: Hash, parent: Hash | None, tokens: tuple[int, ...], extras: tuple[Any, ...]) -> _Page | None:
        last = None if parent is None else self._pages.get(parent)
        if parent is None:
            page = _Page(None, first_key_of(extras), (name,), tokens)
        elif last is None:
            return None
        elif len(last.tokens) == self._block_tokens:
            page = _Page(last.key, None, (name,), tokens)
        else:
            page = _Page(last.before, last.first_key, (*last.pages, name), (*last.tokens, *tokens))
        if len(page.tokens) == self._block_tokens:
            page.end_block(self._block_tokens)
        return page

    def _remove(self, hashes: Iterable[Hash]) -> list[bytes]:
        gone: list[bytes] = []
        for name in hashes:
            self._pages.pop(name, None)
            key = self._key_of.get(name)
            if key is not None:
                for page in self._blocks.pop(key):
                    del self._key_of[page]
                gone.append(key)
        return gone


def salt_of(first_key: bytes) -> str:
    """Of a request whose first block has this key. It tells requests apart as the key does: by model, tenant and tokens."""
    return first_key.hex()


def first_key_of(extras: Iterable[Any]) -> bytes | None:
    for each in extras:
        if isinstance(each, str) and len(each) == 2 * KEY_BYTES:
            try:
                return bytes.fromhex(each)
            except ValueError:
                continue
    return None
