"""The connector's settings: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mooncake.config import load_config, socket_address
from mooncake.core.errors import ConfigError
from mooncake.engine.vllm.layout import KvShape
from mooncake.store.api import Absent, PutResult, Store, named_key

_Seconds = Annotated[float, Meta(gt=0, le=600)]


class ConnectorOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """config: the config.json of a cluster's run folder, such as that of `mooncake store --nodes 1`; it tells the token, the
    cluster and, on the same machine, where the store is. Without it the token comes from MOONCAKE_TOKEN.
    store: data ports of this machine's store node. directory, cluster: a store of many nodes.
    block_tokens: tokens of a block; by default that of the configuration. hand_over_s: how long a request that is to find a
    hand-over waits for it. overlap_bytes: loads of so many bytes of a worker at most are copied while their own step computes,
    larger ones before it. deadline_s: of each call of the store. replace_layout: take over a store whose KV of this model was
    written by engines of another layout, which are gone. in_service: our services drive the engine. Then its requests say which
    keys to use, which nobody else may, and its process ends with its parent."""

    config: str = ""
    store: tuple[str, ...] = ()
    directory: tuple[str, ...] = ()
    cluster: str = ""
    block_tokens: Annotated[int, Meta(ge=1, le=4096)] | None = None
    hand_over_s: _Seconds = 5.0
    overlap_bytes: Annotated[int, Meta(ge=0)] = 64 << 20
    deadline_s: _Seconds = 2.0
    replace_layout: bool = False
    in_service: bool = False


class StorePlace(msgspec.Struct, frozen=True):
    """Where the store is, with all that the configuration says."""

    store: tuple[str, ...]
    directory: tuple[str, ...]
    cluster: str
    token: str
    deadline_s: float

    def connect(self, name: str) -> Store:
        """Raises StoreError."""
        return Store.connect(
            self.store,
            token=self.token,
            directory=self.directory,
            cluster=self.cluster,
            name=name,
            deadline_s=self.deadline_s,
        )


def announce_layout(store: Store, fingerprint: str, shape: KvShape, *, replace: bool) -> None:
    """Engines of one model and store share KV only in one layout. The first one leaves its own there, and others are refused:
    otherwise they would never find anything, and nobody would know why. Raises ConfigError or StoreError."""
    key = _layout_key(fingerprint)
    if replace:
        store.remove(key)
    if store.put(key, msgspec.json.encode(shape), strict=True) is PutResult.CONFLICT:
        raise ConfigError(
            f"layout of KV: {shape.name} here, {read_layout(store, fingerprint).name} in the store; use the same, another "
            'store, or, if no engine of the other kind runs any more, "replace_layout": true in kv_connector_extra_config'
        )
    store.pin(key)


def read_layout(store: Store, fingerprint: str) -> KvShape:
    """Of a model that an engine has announced. Raises StoreError or ConfigError."""
    data = store.get(_layout_key(fingerprint))
    if isinstance(data, Absent):
        raise ConfigError("layout of KV: the store has none, so vLLM's connector has not reached it")
    return msgspec.json.decode(data, type=KvShape)


def _layout_key(fingerprint: str) -> bytes:
    return named_key(f"vllm layout of {fingerprint}")


def read_options(extra: Mapping[str, Any]) -> ConnectorOptions:
    """Raises ConfigError."""
    try:
        return msgspec.convert(dict(extra), ConnectorOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config: {error}") from None


def resolve(options: ConnectorOptions) -> tuple[StorePlace, int]:
    """Where the store is, and the tokens of a block. Raises ConfigError."""
    config = load_config(options.config or None)
    if not config.token:
        raise ConfigError("token: neither kv_connector_extra_config's config nor MOONCAKE_TOKEN says it")
    directory = options.directory
    if not directory and not options.store:
        if not options.config:
            raise ConfigError("kv_connector_extra_config: one of config, store and directory is needed")
        directory = (socket_address(config.run_dir, "directory"),)
    cluster = options.cluster or (config.cluster if options.config else "")
    place = StorePlace(options.store, directory, cluster, config.token, options.deadline_s)
    return place, options.block_tokens or config.block_tokens
