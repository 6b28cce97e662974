"""What a request of vLLM is in our words: the keys of its prompt's KV, and what is to be done with it.

By default both follow from the prompt and the engine's `kv_role`. `kv_transfer_params` of a request change them:

    do_remote_decode     the KV will be fetched: save the tail, too
    do_remote_prefill    the KV is on its way: wait for it, for a while
    mooncake             our services say which keys to use (`HandOver`); from anybody else it is ignored, as whoever chooses
                         keys may read and replace what others stored
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mooncake.core.keys import block_keys, root_key, tail_key

PARAMS = "mooncake"
FAULT = "fault"
"""In the answer of a guided request of our services: why its grammar could not be followed, or nothing."""


class HandOver(msgspec.Struct, frozen=True):
    """What our services say of a request. num_tokens: of the prompt, whose KV is or will be in these objects. keys: of full
    blocks; tail_key: of what comes after them, or empty. grammar: that the output follows, of which the last num_generated
    tokens of the prompt are a part; empty: none."""

    num_tokens: int = 0
    keys: tuple[bytes, ...] = ()
    tail_key: bytes = b""
    save: bool = False
    load: bool = False
    grammar: str = ""
    num_generated: int = 0

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> HandOver:
        """From the request's `kv_transfer_params`. Raises msgspec.ValidationError."""
        return msgspec.convert((params or {}).get(PARAMS, {}), cls)


class RequestKeys(msgspec.Struct, frozen=True):
    """num_tokens: those of the prompt that the objects hold. blocks: keys of the full blocks. tail: key of the tokens after
    them; empty if there are none. wait: it was told that its KV is on its way."""

    num_tokens: int
    blocks: tuple[bytes, ...]
    tail: bytes
    load: bool
    save: bool
    save_tail: bool
    wait: bool


class KeyMaker:
    """loads, saves: what the engine's role is. saves_tails: whether all its prompts are handed over. in_service: whether our
    services drive it."""

    def __init__(
        self,
        fingerprint: str,
        block_tokens: int,
        *,
        loads: bool,
        saves: bool,
        saves_tails: bool,
        in_service: bool = False,
    ) -> None:
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._loads = loads
        self._saves = saves
        self._saves_tails = saves_tails
        self._in_service = in_service

    def keys(
        self,
        token_ids: Sequence[int],
        params: Mapping[str, Any] | None = None,
        *,
        lora: str = "",
        salt: str = "",
        extras: Sequence[str] = (),
    ) -> RequestKeys:
        """Raises msgspec.ValidationError if what our services say is malformed. extras: what the tokens do not tell, such as
        images and where they are."""
        params = params or {}
        if self._in_service:
            return _told(HandOver.of(params))
        root = root_key(self._fingerprint, lora=lora, salt=salt, extras=extras)
        blocks = block_keys(root, token_ids, self._block_tokens)
        rest = token_ids[len(blocks) * self._block_tokens :]
        return RequestKeys(
            len(token_ids),
            blocks,
            tail_key(blocks[-1] if blocks else root, rest) if rest else b"",
            load=self._loads,
            save=self._saves,
            save_tail=self._saves and (self._saves_tails or bool(params.get("do_remote_decode"))),
            wait=self._loads and bool(params.get("do_remote_prefill")),
        )


def _told(told: HandOver) -> RequestKeys:
    return RequestKeys(told.num_tokens, told.keys, told.tail_key, told.load, told.save, save_tail=told.save, wait=False)


def response_params(keys: RequestKeys, layout: str) -> dict[str, Any] | None:
    """What the answer of a request tells whoever passes its KV on, in the spelling that routers of P/D pairs know."""
    if not keys.save_tail:
        return None
    return {"do_remote_prefill": True, "do_remote_decode": False, "num_tokens": keys.num_tokens, "layout": layout}
