"""Keys of vLLM's requests, the connector's settings, and what is refused by name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake.core.errors import ConfigError
from mooncake.core.keys import block_keys, root_key, tail_key
from mooncake.engine.vllm.layout import KvShape
from mooncake.engine.vllm.options import ConnectorOptions, announce_layout, read_layout, read_options, resolve
from mooncake.engine.vllm.requests import PARAMS, HandOver, KeyMaker, RequestKeys, response_params
from mooncake.engine.vllm.versions import SUPPORTED, check_version
from mooncake.store.api import Store
from tests.store.helpers import TOKEN, run, running_node

TOKENS = list(range(20))
ROOT = root_key("model")
BLOCKS = block_keys(ROOT, TOKENS, 8)
TAIL = tail_key(BLOCKS[-1], TOKENS[16:])


def maker(**options: bool) -> KeyMaker:
    return KeyMaker("model", 8, **({"loads": True, "saves": True, "saves_tails": False} | options))


def test_keys_are_those_of_the_whole_system_and_the_tail_follows_from_its_tokens() -> None:
    assert maker().keys(TOKENS) == RequestKeys(20, BLOCKS, TAIL, True, True, False, False)
    assert maker().keys(TOKENS[:16]).tail == b""
    assert maker().keys(TOKENS[:7]) == RequestKeys(7, (), tail_key(ROOT, TOKENS[:7]), True, True, False, False)


@pytest.mark.parametrize("other", [{"lora": "a"}, {"salt": "tenant"}, {"extras": ("image@3",)}])
def test_nothing_is_shared_between_adapters_tenants_and_images(other: dict[str, Any]) -> None:
    mine, theirs = maker().keys(TOKENS), maker().keys(TOKENS, **other)
    assert not {*mine.blocks, mine.tail} & {*theirs.blocks, theirs.tail}


def test_tails_are_saved_by_a_prefill_engine_or_where_a_router_asks_for_it() -> None:
    assert maker(saves_tails=True).keys(TOKENS).save_tail
    asked = maker().keys(TOKENS, {"do_remote_decode": True})
    assert asked.save_tail and not asked.wait
    told = response_params(asked, "layout")
    assert told == {"do_remote_prefill": True, "do_remote_decode": False, "num_tokens": 20, "layout": "layout"}
    assert response_params(maker().keys(TOKENS), "layout") is None
    followed = maker(saves=False).keys(TOKENS, told)
    assert followed.wait and not followed.save and followed.tail == asked.tail


def test_our_services_say_which_keys_to_use() -> None:
    told = HandOver(12, BLOCKS[:1], b"p" * 16, save=True, load=True, grammar="start: /a/", num_generated=2)
    params = {PARAMS: msgspec.to_builtins(told, builtin_types=(bytes,))}
    assert HandOver.of(params) == told and HandOver.of(None) == HandOver()
    served = maker(in_service=True)
    assert served.keys(TOKENS, params) == RequestKeys(12, BLOCKS[:1], b"p" * 16, True, True, True, False)
    assert (
        served.keys(TOKENS, {PARAMS: {}}) == served.keys(TOKENS) == RequestKeys(0, (), b"", False, False, False, False)
    )
    with pytest.raises(msgspec.ValidationError):
        served.keys(TOKENS, {PARAMS: {"keys": 3}})
    assert maker().keys(TOKENS, params) == maker().keys(TOKENS), "a client must not choose keys"


def test_unknown_settings_and_releases_are_named() -> None:
    assert read_options({"store": ["unix:/s"], "hand_over_s": 2}) == ConnectorOptions(
        store=("unix:/s",), hand_over_s=2.0
    )
    with pytest.raises(ConfigError, match="kv_connector_extra_config: Object contains unknown field `stoer`"):
        read_options({"stoer": []})
    with pytest.raises(ConfigError, match=r"Expected `int` >= 1 - at `\$.block_tokens`"):
        read_options({"block_tokens": 0})
    check_version(f"{SUPPORTED[-1]}+cpu")
    with pytest.raises(ConfigError, match=f"vllm = 0.1.0: this release supports vLLM {SUPPORTED[0]}"):
        check_version("0.1.0")


def test_where_the_store_is_comes_from_the_clusters_folder_or_from_the_settings(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(f'{{"token": "secret", "cluster": "demo", "run_dir": "{tmp_path}", "block_tokens": 256}}')
    place, block_tokens = resolve(ConnectorOptions(config=str(config)))
    assert (place.directory, place.cluster, place.token) == ((f"unix:{tmp_path}/directory.sock",), "demo", "secret")
    assert block_tokens == 256
    place, block_tokens = resolve(ConnectorOptions(config=str(config), store=("tcp://h:1",), block_tokens=64))
    assert (place.store, place.directory, block_tokens) == (("tcp://h:1",), (), 64)
    with pytest.raises(ConfigError, match="token"):
        resolve(ConnectorOptions(store=("tcp://h:1",)))


def test_another_layout_of_the_same_model_is_refused_with_both() -> None:
    one = KvShape("float32", 2, 64, 16, 128, 3, 512)
    other = msgspec.structs.replace(one, kv_heads=1, tp=2)

    def act(address: str) -> None:
        with Store.connect([address], token=TOKEN) as store:
            announce_layout(store, "model", one, replace=False)
            announce_layout(store, "model", one, replace=False)
            announce_layout(store, "another model", other, replace=False)
            with pytest.raises(
                ConfigError, match=r"tensor_parallel_size=2.*here, .*tensor_parallel_size=1.* in the store"
            ):
                announce_layout(store, "model", other, replace=False)
            assert read_layout(store, "model") == one
            store.unpin(next(iter(store._pins)))
            announce_layout(store, "model", other, replace=True)
            assert read_layout(store, "model") == other
            with pytest.raises(ConfigError, match="the store has none"):
                read_layout(store, "unheard of")

    async def main() -> None:
        async with running_node() as node:
            await asyncio.to_thread(act, node.addresses[0])

    run(main())


def test_workers_have_shards_of_their_own() -> None:
    shape = KvShape("float32", 2, 64, 16, 128, 3, 512, tp=2, pp=2)
    assert len(set(shape.shards())) == 4 and shape.shard(1, 0) in shape.shards()
    assert not set(shape.shards()) & set(msgspec.structs.replace(shape, tp=1).shards())
