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
    """tokens: of its block up to its end. before: key of the block before, None for the first of a sequence."""

    __slots__ = ("before", "first_key", "key", "tokens")

    def __init__(self, before: bytes | None, first_key: bytes | None, tokens: tuple[int, ...]) -> None:
        self.before = before
        self.first_key = first_key
        self.tokens = tokens
        self.key: bytes | None = None
        """Of the block that ends here."""


class CachedBlocks:
    """Blocks all of whose pages vLLM has."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._pages: dict[Hash, _Page] = {}
        self._blocks: dict[Hash, bytes] = {}
        """By each page of a cached block, its key."""
        self._members: dict[bytes, Keys | tuple[Hash, ...]] = {}
        self._chain: dict[Hash, tuple[Hash, ...]] = {}
        """By page, the pages of its block up to it."""

    def keys(self) -> Keys:
        return tuple(self._members)

    def apply(self, events: Iterable[KvEvent]) -> tuple[Keys, Keys]:
        """Keys (added, removed); one that came and went is in neither."""
        added: dict[bytes, None] = {}
        removed: dict[bytes, None] = {}
        for event in events:
            if isinstance(event, Stored):
                for key in self._store(event):
                    if key in removed:
                        del removed[key]
                    else:
                        added[key] = None
            else:
                gone = self._remove(event.hashes) if isinstance(event, Removed) else self.forget()
                for key in gone:
                    if key in added:
                        del added[key]
                    else:
                        removed[key] = None
        return tuple(added), tuple(removed)

    def forget(self) -> Keys:
        """All; gives their keys."""
        keys = self.keys()
        for table in (self._pages, self._blocks, self._members, self._chain):
            table.clear()
        return keys

    def _store(self, event: Stored) -> list[bytes]:
        found: list[bytes] = []
        parent, size = event.parent, event.page_tokens
        for at, page_hash in enumerate(event.hashes):
            tokens = event.token_ids[at * size : (at + 1) * size]
            extras = event.extras[at] if at < len(event.extras) else ()
            page = self._pages.get(page_hash) or self._page(parent, tokens, extras)
            if page is None:
                return found  # it follows what we have not heard of
            self._pages[page_hash] = page
            before = self._chain.get(parent, ()) if parent is not None and len(page.tokens) > len(tokens) else ()
            self._chain[page_hash] = (*before, page_hash)
            if page.key is not None and page.key not in self._members:
                self._add(page.key, self._chain[page_hash])
                found.append(page.key)
            parent = page_hash
        return found

    def _page(self, parent: Hash | None, tokens: tuple[int, ...], extras: tuple[Any, ...]) -> _Page | None:
        if parent is None:
            page = _Page(None, first_key_of(extras), tokens)
        else:
            last = self._pages.get(parent)
            if last is None:
                return None
            if len(last.tokens) == self._block_tokens:
                page = _Page(last.key, None, tokens)
            else:
                page = _Page(last.before, last.first_key, (*last.tokens, *tokens))
        if len(page.tokens) == self._block_tokens:
            if page.before is not None:
                [page.key] = block_keys(page.before, page.tokens, self._block_tokens)
            else:
                page.key = page.first_key
        return page

    def _add(self, key: bytes, pages: tuple[Hash, ...]) -> None:
        self._members[key] = pages
        self._blocks.update(dict.fromkeys(pages, key))

    def _remove(self, hashes: Iterable[Hash]) -> list[bytes]:
        gone: list[bytes] = []
        for page_hash in hashes:
            self._pages.pop(page_hash, None)
            self._chain.pop(page_hash, None)
            key = self._blocks.get(page_hash)
            if key is not None:
                for page in self._members.pop(key):
                    self._blocks.pop(page, None)
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
