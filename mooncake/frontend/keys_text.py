"""What `mooncake keys` reads and shows: options, expiry, listings."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from mooncake.config import parse_bytes
from mooncake.core.errors import ConfigError
from mooncake.frontend.keys import KeyFile, Tenant, TenantChanges
from mooncake.frontend.rate_limits import Limits

TENANT_TEXTS = {
    "weight": "share under load beside those of other tenants; 1",
    "share_group": "tenants of one group reuse each other's KV; empty: none",
    "requests_per_minute": "a bucket that fills evenly",
    "tokens_per_minute": "prompt and output",
    "concurrent_requests": "at once",
    "priority_max": "highest x-mooncake-priority; 0",
    "store_bytes": "KV kept in the store's memory, such as 2GiB; serve reads it at its start",
}
"""Options of a tenant, with their help."""
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_changes(given: Mapping[str, Any]) -> TenantChanges:
    """Raises ConfigError. Options that are None or missing change nothing."""
    values: dict[str, Any] = {name: given[name] for name in TENANT_TEXTS if given.get(name) is not None}
    if "store_bytes" in values:
        values["store_bytes"] = parse_bytes(text := values["store_bytes"])
        if values["store_bytes"] is None:
            raise ConfigError(f"--store-bytes {text!r}: expected a size such as 512MiB or 2GiB")
    for name, value in values.items():
        kind = {"weight": float, "share_group": str}.get(name, int)
        try:
            values[name] = msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value!r}: expected a{' whole' if kind is int else ''} number") from None
    return TenantChanges(**values)


def parse_expiry(text: str | None, now_s: int) -> int | None:
    """Unix seconds. Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is not None and int(match[1]):
        return now_s + int(match[1]) * _UNIT_S[match[2]]
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--expires {text!r}: expected such as 12h, 30d or 2027-01-31") from None
    expires = int((at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC)).timestamp())
    if expires <= now_s:
        raise ConfigError(f"--expires {text!r}: is over already")
    return expires


# ---------------------------------------------------------------- listings


class KeyRow(msgspec.Struct, frozen=True):
    id: str
    tenant: str
    state: str
    created: str
    expires: str | None
    admin: bool


class Listing(msgspec.Struct, frozen=True):
    """Without salts and hashes."""

    keys: list[KeyRow]
    tenants: dict[str, Tenant]


def listing(content: KeyFile, now_s: float) -> Listing:
    rows = [
        KeyRow(
            key.id,
            key.tenant,
            key.state(now_s),
            _date(key.created),
            _date(key.expires) if key.expires is not None else None,
            key.admin,
        )
        for key in content.keys
    ]
    return Listing(rows, content.tenants)


def listing_text(found: Listing) -> str:
    heads = ("key", "tenant", "state", "created", "expires", "admin")
    rows = [
        (row.id, row.tenant, row.state, row.created, row.expires or "never", "yes" if row.admin else "")
        for row in found.keys
    ]
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    tenants = [f"{name}: {tenant_text(tenant)}" for name, tenant in found.tenants.items()]
    return "\n".join([line.rstrip() for line in lines] + ["", *tenants])


def tenant_text(tenant: Tenant) -> str:
    words = [f"weight {tenant.weight:g}"]
    if tenant.share_group:
        words.append(f"share group {tenant.share_group}")
    for name in Limits.__struct_fields__:
        value = getattr(tenant.limits, name)
        if value is not None:
            words.append(f"{name.replace('_', ' ')} {value:,}")
    return ", ".join(words)


def _date(time_s: int) -> str:
    return dt.datetime.fromtimestamp(time_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
