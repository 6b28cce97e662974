"""API keys and tenants, in one file that the operator owns.

    {"version": 1,
     "tenants": {NAME: {"weight": 1.0, "share_group": "", "limits": {...}}},
     "keys": [{"id": ..., "tenant": NAME, "salt": ..., "hash": ...,
               "created": ..., "expires": ..., "revoked": ..., "admin": ...}]}

A key is `mk-ID-SECRET`. The file has the id and a salted BLAKE2b hash, so whoever reads the file cannot call the API. A fast
hash is right here: SECRET is 192 random bits, which no number of guesses finds; slow hashes are for words that people choose,
and would cost every request milliseconds.

The file is replaced as a whole, with mode 0600, under a lock: a reader sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from mooncake.core.errors import ConfigError
from mooncake.core.types import WEIGHT_MAX, WEIGHT_MIN
from mooncake.frontend.rate_limits import Limits

FILE_VERSION = 1
MAX_FILE_BYTES = 16 << 20
"""Some 50,000 keys; a file that grows beyond is a mistake."""
_ID_BYTES, _SECRET_BYTES, _SALT_BYTES = 6, 24, 16
_KEY = re.compile(r"mk-([0-9a-f]{12})-([0-9a-f]{48})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOBODY_SALT, _NOBODY_HASH = "00" * _SALT_BYTES, "00" * 32


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """weight: its share under load, beside those of the others. share_group: tenants of one group reuse each other's KV."""

    weight: Annotated[float, Meta(ge=WEIGHT_MIN, le=WEIGHT_MAX)] = 1.0
    share_group: str = ""
    limits: Limits = Limits()


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Times are Unix seconds. admin: may read metrics, and name the tenant that a request is for."""

    id: str
    tenant: str
    salt: str
    hash: str
    created: int
    expires: int | None = None
    revoked: int | None = None
    admin: bool = False

    def state(self, now_s: float) -> str:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now_s >= self.expires else "active"


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=FILE_VERSION, le=FILE_VERSION)] = FILE_VERSION
    tenants: dict[str, Tenant] = {}
    keys: tuple[Key, ...] = ()


def check_name(what: str, name: str) -> str:
    """Raises ConfigError."""
    if not _TENANT.fullmatch(name):
        raise ConfigError(f"{what} {name[:80]!r}: expected 1 to 64 letters, digits, '.', '_' or '-'")
    return name


def is_tenant_name(text: str) -> bool:
    return _TENANT.fullmatch(text) is not None


# ---------------------------------------------------------------- keys


def new_key(tenant: str, now_s: int, expires: int | None, *, admin: bool) -> tuple[Key, str]:
    """The record, and the key itself, which is kept nowhere."""
    key_id, secret, salt = (secrets.token_hex(size) for size in (_ID_BYTES, _SECRET_BYTES, _SALT_BYTES))
    return Key(key_id, tenant, salt, _hash(salt, secret), now_s, expires, admin=admin), f"mk-{key_id}-{secret}"


def find_key(keys: dict[str, Key], text: str) -> Key | None:
    """The key of that text, whatever state it is in. Takes as long for a known id as for an unknown one."""
    match = _KEY.fullmatch(text)
    if match is None:
        return None
    found = keys.get(match[1])
    salt, expected = (found.salt, found.hash) if found is not None else (_NOBODY_SALT, _NOBODY_HASH)
    return found if hmac.compare_digest(_hash(salt, match[2]), expected) else None


def _hash(salt: str, secret: str) -> str:
    return hashlib.blake2b(secret.encode(), digest_size=32, salt=bytes.fromhex(salt)).hexdigest()


# ---------------------------------------------------------------- the file


def read_keys(path: Path) -> KeyFile:
    """Raises ConfigError, also for a file that others could write to."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from None
    if mode & 0o022:
        raise ConfigError(f"key file {path}: others can write to it (mode {mode & 0o777:04o}); chmod 600 it")
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"key file {path}: larger than {MAX_FILE_BYTES} bytes")
    return _decode(path, data)


def _decode(path: Path, data: bytes) -> KeyFile:
    try:
        found = msgspec.json.decode(data, type=KeyFile)
        for name, tenant in found.tenants.items():
            check_name("tenant", name)
            if tenant.share_group:
                check_name("share group", tenant.share_group)
        for key in found.keys:
            bytes.fromhex(key.salt + key.hash)
            if len(key.salt) != 2 * _SALT_BYTES or key.tenant not in found.tenants:
                raise ConfigError(f"key {key.id[:40]!r} has no valid salt, or names no tenant of this file")
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"key file {path}: {error}") from None
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The lock is a file beside it, as the file itself is replaced."""
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_keys(path: Path, content: KeyFile) -> None:
    """NamedTemporaryFile makes files of mode 0600."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as file:
        try:
            file.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def store_quotas(content: KeyFile) -> dict[str, int]:
    """Bytes by tenant, of those that have `store_bytes`."""
    limits = {name: tenant.limits.store_bytes for name, tenant in content.tenants.items()}
    return {name: quota for name, quota in limits.items() if quota is not None}


# ---------------------------------------------------------------- what the command does


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[KeyFile]:
    """The content, under the lock; a file that is not there yet is empty."""
    try:
        with _locked(path):
            yield read_keys(path) if path.exists() else KeyFile()
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from None


def add_key(path: Path, tenant: str, changes: TenantChanges, now_s: int, expires: int | None, *, admin: bool) -> str:
    """The new key. A tenant that is not there yet is made; of one that is, what is given is changed."""
    check_name("tenant", tenant)
    with _opened(path) as content:
        key, text = new_key(tenant, now_s, expires, admin=admin)
        tenants = {**content.tenants, tenant: changes.apply(content.tenants.get(tenant, Tenant()))}
        _write_keys(path, KeyFile(FILE_VERSION, tenants, (*content.keys, key)))
    return text


def change_tenant(path: Path, tenant: str, changes: TenantChanges) -> Tenant:
    with _opened(path) as content:
        if tenant not in content.tenants:
            raise ConfigError(f"key file {path}: there is no tenant {tenant[:80]!r}")
        changed = changes.apply(content.tenants[tenant])
        _write_keys(path, KeyFile(FILE_VERSION, {**content.tenants, tenant: changed}, content.keys))
    return changed


def revoke_key(path: Path, key_id: str, now_s: int) -> Key:
    """By id, or by the key itself. To revoke it twice changes nothing."""
    match = _KEY.fullmatch(key_id)
    wanted = match[1] if match is not None else key_id.removeprefix("mk-")
    with _opened(path) as content:
        found = next((key for key in content.keys if key.id == wanted), None)
        if found is None:
            raise ConfigError(f"key file {path}: there is no key with id {wanted[:40]!r}")
        if found.revoked is not None:
            return found
        revoked = msgspec.structs.replace(found, revoked=now_s)
        keys = tuple(revoked if key is found else key for key in content.keys)
        _write_keys(path, KeyFile(FILE_VERSION, content.tenants, keys))
    return revoked


class TenantChanges(msgspec.Struct, frozen=True):
    """What to change of a tenant; None: leave it."""

    weight: float | None = None
    share_group: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    priority_max: int | None = None
    store_bytes: int | None = None

    def apply(self, tenant: Tenant) -> Tenant:
        """Raises ConfigError for a value out of bounds."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        own = {name: given.pop(name) for name in ("weight", "share_group") if name in given}
        if own.get("share_group"):
            check_name("share group", own["share_group"])
        changed = msgspec.structs.replace(tenant, **own, limits=msgspec.structs.replace(tenant.limits, **given))
        try:
            return msgspec.convert(msgspec.to_builtins(changed), Tenant)
        except msgspec.ValidationError as error:
            expected, _, path = str(error).rstrip("`").partition(" - at `$.")
            name = path.rpartition(".")[2]
            raise ConfigError(f"{name} = {getattr(self, name)}: {expected[:1].lower()}{expected[1:]}") from None
