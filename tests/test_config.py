"""One declaration: sources, bounds, and what a bad value says."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake.config import (
    Config,
    Launch,
    SloConfig,
    child_environment,
    cores_of_instance,
    default_run_dir,
    engine_environment,
    format_bytes,
    load_config,
    options,
    parse_bytes,
    read_launch,
    save_config,
    socket_address,
    threads_per_instance,
)
from mooncake.core.errors import ConfigError
from mooncake.scheduler.service import conductor_config


def test_defaults() -> None:
    config = load_config(environ={})
    assert msgspec.structs.replace(config, run_dir="") == Config()
    assert config.run_dir.endswith("-default")


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('prefill = 2\ndecode = 2\nport = 1\nstore_memory = "2GiB"\n[slo]\nttft_s = 2\n')
    environ = {"MOONCAKE_DECODE": "3", "MOONCAKE_PORT": "2", "MOONCAKE_SLO_TBT_S": "0.2", "PATH": "/bin"}
    config = load_config(str(file), {"port": "3"}, environ)
    assert (config.prefill, config.decode, config.port) == (2, 3, 3)
    assert config.store_memory == 2 << 30
    assert config.slo == SloConfig(ttft_s=2.0, tbt_s=0.2)


def test_rates_are_what_the_conductor_prices_by() -> None:
    config = load_config(flags={"rates.dram_bytes_per_s": "12GB", "rates.nic_bytes_per_s": "1GiB"}, environ={})
    rates = conductor_config(config).rates
    assert (rates.dram_bytes_per_s, rates.nic_bytes_per_s, rates.remote_bytes_per_s) == (12e9, 1 << 30, 5e9)


def test_auto_and_none_unset_an_option(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('threads = 4\nevent_log = "/tmp/log"\n')
    config = load_config(str(file), {"threads": "auto"}, {"MOONCAKE_EVENT_LOG": "none"})
    assert (config.threads, config.event_log) == (None, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prefill", "0", "prefill = '0' (--prefill): expected `int` >= 1"),
        ("port", "http", "port = 'http' (--port): expected `int`, got `str`"),
        ("port", "65536", "port = '65536' (--port): expected `int` <= 65535"),
        ("replicate", "yes", "replicate = 'yes' (--replicate): expected one of off, on"),
        ("switch_roles", "true", "switch_roles = 'true' (--switch-roles): expected one of off, on"),
        ("engine", "tpu", "engine = 'tpu' (--engine): expected one of torch, vllm, simulated"),
        (
            "store_memory",
            "2 GB of it",
            "store_memory = '2 GB of it' (--store-memory): expected a size such as 512MiB or 2GiB",
        ),
        ("slo.ttft_s", "nan", "slo.ttft_s = 'nan' (--slo-ttft-s): expected `float` > 0.0"),
        ("slo.ttft_s", "inf", "slo.ttft_s = 'inf' (--slo-ttft-s): expected `float` <= 1000000.0"),
        ("prefil", "1", "prefil (flag): unknown key; did you mean prefill?"),
        ("page_tokens", "33", "page_tokens = 33: does not divide block_tokens = 128"),
        ("kv_tokens", "100", "kv_tokens = 100: less than one block of 128 tokens"),
        ("tls.cert", "a.pem", "tls.cert and tls.key: only one of them is set"),
        ("store_ssd", "1TiB", "store_ssd and store_ssd_dir: only one of them is set"),
        ("store_ssd_dir", "/mnt/ssd", "store_ssd and store_ssd_dir: only one of them is set"),
        ("run_dir", "here", "run_dir = 'here': must be an absolute path"),
        ("token", 7, "token = (secret) (--token): expected `str`, got `int`"),
    ],
)
def test_bad_value_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {key: value}, {})
    assert str(caught.value) == message


def test_an_ssd_has_a_size_and_an_absolute_folder() -> None:
    given = {"store_ssd": "1TiB", "store_ssd_dir": "/mnt/ssd"}
    assert load_config(None, given, {}).store_ssd == 1 << 40
    with pytest.raises(ConfigError, match=r"^store_ssd_dir = 'here': must be an absolute path$"):
        load_config(None, given | {"store_ssd_dir": "here"}, {})
    with pytest.raises(ConfigError, match=r"^store_ssd = 1024: must be at least 16MiB$"):
        load_config(None, given | {"store_ssd": 1024}, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prefill = 0", "prefill = 0 (config file FILE): expected `int` >= 1"),
        ("[slo]\nttft = 1", "slo.ttft (config file FILE): unknown key; did you mean slo.ttft_s?"),
        ("[model]\nname = 'x'", "model.name (config file FILE): unknown key; did you mean model_name?"),
        ("slo = 3", "slo (config file FILE): unknown key"),
        ("prefill = ", "config file FILE: Invalid value (at end of document)"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), environ={})
    assert str(caught.value).replace(str(file), "FILE").startswith(message)


def test_missing_file_and_unknown_variable() -> None:
    with pytest.raises(ConfigError, match=r"^config file /nowhere/x.toml: No such file or directory$"):
        load_config("/nowhere/x.toml", environ={})
    with pytest.raises(
        ConfigError, match=r"^MOONCAKE_PREFIL \(environment\): unknown variable; did you mean MOONCAKE_PREFILL\?$"
    ):
        load_config(environ={"MOONCAKE_PREFIL": "1"})


def test_resolved_file_reads_back_equal_and_is_private(tmp_path: Path) -> None:
    flags = {"token": "secret", "slo.ttft_s": "1.5", "threads": "2", "tls.cert": "c", "tls.key": "k"}
    config = load_config(None, flags, {})
    file = tmp_path / "config.json"
    save_config(config, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load_config(str(file), environ={}) == config
    assert list(tmp_path.iterdir()) == [file]


def test_every_option_has_one_spelling_per_source_and_a_default_that_parses() -> None:
    found = options().values()
    assert len({option.flag for option in found}) == len({option.variable for option in found}) == len(found)
    for option in found:
        assert option.text
        shown = option.render_default()
        assert option.parse("" if shown == "empty" else shown, "test") == option.default


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("1.5 g", 1_500_000_000),
        ("512mib", 512 << 20),
        ("3k", 3000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "2 apples", "0x10", "1.2.3", "1 2"])
def test_sizes_that_are_none(text: str) -> None:
    assert parse_bytes(text) is None


@pytest.mark.parametrize("count", [1, 1000, 1 << 10, 3 << 20, 5 << 30, (1 << 30) + 1])
def test_sizes_are_printed_as_they_are_read(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count


def test_run_dir_and_socket_paths(tmp_path: Path) -> None:
    assert default_run_dir("a", {"XDG_RUNTIME_DIR": str(tmp_path)}) == f"{tmp_path}/mooncake-a"
    assert default_run_dir("a", {"XDG_RUNTIME_DIR": "/nowhere"}).startswith("/tmp/mooncake-")
    assert socket_address("/run/x", "prefill-0") == "unix:/run/x/prefill-0.sock"
    with pytest.raises(ConfigError, match="too long"):
        load_config(None, {"run_dir": "/" + "x" * 90}, {})


def test_launch_variables() -> None:
    assert read_launch({}) == Launch(None, None)
    assert read_launch({"MOONCAKE_STATUS_FD": "7", "MOONCAKE_SUPERVISOR_PID": "12"}) == Launch(7, 12)
    with pytest.raises(ConfigError, match="MOONCAKE_STATUS_FD = 'x'"):
        read_launch({"MOONCAKE_STATUS_FD": "x"})
    assert child_environment({"A": "1"}, {"MOONCAKE_PORT": "1", "HOME": "/h"}) == {"HOME": "/h", "A": "1"}


def test_threads_share_the_cores() -> None:
    assert threads_per_instance(Config(threads=7)) == 7
    assert threads_per_instance(Config(prefill=64, decode=64)) == 1


def test_instances_of_vllm_have_cores_of_their_own_as_far_as_there_are_any() -> None:
    cores = sorted(os.sched_getaffinity(0))
    config = Config(engine="vllm", threads=1)
    assert [cores_of_instance(config, index) for index in range(len(cores) + 1)] == [
        [each] for each in (*cores, cores[0])
    ]
    assert sorted(cores_of_instance(Config(threads=1000), 3)) == cores
    assert engine_environment(config)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not [name for name in engine_environment(Config()) if name.startswith("VLLM")]
