"""The key file: what is in it, who may change it, and how a running frontend learns of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake.core.errors import ConfigError
from mooncake.frontend.keyring import LOOK_AGAIN_S, Keyring
from mooncake.frontend.keys import TenantChanges, add_key, change_tenant, find_key, read_keys, revoke_key, store_quotas
from mooncake.frontend.keys_text import listing, listing_text, parse_changes, parse_expiry

NOW = 1_800_000_000
NOTHING = TenantChanges()


def add(path: Path, tenant: str = "acme", expires: int | None = None, *, admin: bool = False) -> str:
    return add_key(path, tenant, NOTHING, NOW, expires, admin=admin)


def test_the_file_has_no_key_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add(path)
    prefix, key_id, secret = text.split("-")
    assert (prefix, len(key_id), len(secret)) == ("mk", 12, 48)
    assert secret not in path.read_text() and key_id in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]


def test_equal_secrets_would_have_different_hashes(tmp_path: Path) -> None:
    keys = [read_keys(path).keys[0] for path in (tmp_path / "a", tmp_path / "b") if add(path)]
    assert keys[0].salt != keys[1].salt and len(keys[0].salt) == 32 and len(keys[0].hash) == 64


def test_a_key_is_found_by_its_whole_text_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    one, other = add(path), add(path, "other")
    keys = {key.id: key for key in read_keys(path).keys}
    assert [find_key(keys, text).tenant for text in (one, other)] == ["acme", "other"]  # type: ignore[union-attr]
    swapped = one[:16] + other[16:]
    for wrong in (
        swapped,
        one[:-1],
        one + "0",
        one.upper(),
        "",
        "mk-",
        "sk-" + one[3:],
        "mk-" + "0" * 12 + one[15:],
        "é",
    ):
        assert find_key(keys, wrong) is None, wrong


def test_states_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, expires=NOW + 10)
    [key] = read_keys(path).keys
    assert [key.state(NOW + after) for after in (0, 9, 10)] == ["active", "active", "expired"]
    revoked = revoke_key(path, key.id, NOW + 5)
    assert revoked.state(NOW + 5) == revoked.state(NOW + 99) == "revoked"
    assert revoke_key(path, key.id, NOW + 7).revoked == NOW + 5


def test_limits_are_changed_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "acme", TenantChanges(weight=2.0, requests_per_minute=10), NOW, None, admin=False)
    add_key(path, "acme", TenantChanges(tokens_per_minute=500), NOW, None, admin=True)
    change_tenant(path, "acme", TenantChanges(share_group="friends", store_bytes=1 << 30))
    tenant = read_keys(path).tenants["acme"]
    limits = tenant.limits
    add_key(path, "other", TenantChanges(), NOW, None, admin=False)
    assert store_quotas(read_keys(path)) == {"acme": 1 << 30}
    assert (tenant.weight, tenant.share_group) == (2.0, "friends")
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.store_bytes) == (10, 500, 1 << 30)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda path: add(path, "a/b"), "tenant 'a/b': expected 1 to 64 letters"),
        (lambda path: change_tenant(path, "who", NOTHING), "there is no tenant 'who'"),
        (lambda path: revoke_key(path, "123", NOW), "there is no key with id '123'"),
        (lambda path: change_tenant(path, "acme", TenantChanges(weight=0)), "weight = 0: expected `float` >= 0.001"),
        (
            lambda path: change_tenant(path, "acme", TenantChanges(requests_per_minute=-1)),
            "requests_per_minute = -1: expected `int` >= 1",
        ),
        (lambda path: add(path / "sub"), "Not a directory"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, call: object, sentence: str) -> None:
    path = tmp_path / "keys.json"
    add(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as found:
        call(path)  # type: ignore[operator]
    assert sentence in str(found.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "Input data was truncated"),
        (b'{"version": 2}', "Expected `int` <= 1"),
        (b'{"version": 1, "colour": 1}', "unknown field `colour`"),
        (b'{"tenants": {"a b": {}}}', "tenant 'a b'"),
        (b'{"keys": [{"id": "1", "tenant": "x", "salt": "zz", "hash": "", "created": 1}]}', "non-hexadecimal"),
        (
            b'{"keys": [{"id": "1", "tenant": "x", "salt": "00", "hash": "00", "created": 1}]}',
            "key '1' has no valid salt",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as found:
        read_keys(path)
    assert sentence in str(found.value) and str(path) in str(found.value)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path)
    path.chmod(0o620)
    with pytest.raises(ConfigError, match=r"others can write to it \(mode 0620\)"):
        read_keys(path)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    code = (
        "import sys; from pathlib import Path; from mooncake.frontend.keys import *\n"
        "for _ in range(10): add_key(Path(sys.argv[1]), sys.argv[2], TenantChanges(), 1, None, admin=False)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), f"t{at}"]) for at in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len({key.id for key in read_keys(path).keys}) == 30


# ---------------------------------------------------------------- the running frontend


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_change_is_known_after_a_quarter_of_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", _Clock()
    text = add(path)
    keyring = Keyring(path, clock)
    assert keyring.find(text, NOW) is not None
    later = add(path, "later")
    revoke_key(path, text, NOW)
    clock.now = LOOK_AGAIN_S * 0.9
    assert (keyring.find(text, NOW) is not None, keyring.find(later, NOW)) == (True, None)
    clock.now = LOOK_AGAIN_S
    assert keyring.find(text, NOW) is None
    found = keyring.find(later, NOW)
    assert found is not None and found.tenant == "later"
    assert LOOK_AGAIN_S <= 1.0


def test_a_broken_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys.json", _Clock()
    text = add(path)
    keyring = Keyring(path, clock)
    path.write_text("{")
    clock.now = 1
    assert keyring.find(text, NOW) is not None
    assert "the keys read before stay in force" in caplog.text
    os.unlink(path)
    clock.now = 2
    assert keyring.find(text, NOW) is not None
    clock.now = 3
    add(path, "new")
    clock.now = 4
    assert keyring.find(text, NOW) is None


def test_an_expired_key_is_not_found(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add(path, expires=NOW + 10)
    keyring = Keyring(path)
    assert keyring.find(text, NOW + 9.9) is not None and keyring.find(text, NOW + 10) is None


def test_no_file_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Keyring(tmp_path / "nowhere.json")


# ---------------------------------------------------------------- the command's words


def test_expiry() -> None:
    assert parse_expiry(None, NOW) is None
    assert parse_expiry("90m", NOW) == NOW + 5400
    assert parse_expiry("30d", NOW) == NOW + 30 * 86_400
    assert parse_expiry("2030-01-01", NOW) == 1_893_456_000
    for wrong in ("soon", "0d", "-1d", "2020-01-01"):
        with pytest.raises(ConfigError, match=f"--expires '{wrong}'"):
            parse_expiry(wrong, NOW)


def test_options_of_a_tenant() -> None:
    found = parse_changes({"weight": "2.5", "requests_per_minute": "60", "store_bytes": "2GiB", "share_group": None})
    assert found == TenantChanges(weight=2.5, requests_per_minute=60, store_bytes=2 << 30)
    for name, value in (("weight", "x"), ("tokens_per_minute", "1.5"), ("store_bytes", "much")):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} '{value}'"):
            parse_changes({name: value})


def test_the_list_shows_states_and_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add(path, admin=True)
    add(path, "other", NOW + 1)
    content = read_keys(path)
    shown = listing_text(listing(content, NOW + 1))
    lines = shown.splitlines()
    assert lines[1].split() == [text.split("-")[1], "acme", "active", "2027-01-15T08:00:00Z", "never", "yes"]
    assert lines[2].split()[2] == "expired"
    assert lines[4:] == ["acme: weight 1, priority max 0", "other: weight 1, priority max 0"]
    for key in content.keys:
        assert key.hash not in json.dumps(shown) and key.salt not in shown
