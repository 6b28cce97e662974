"""Who may come in, and whom a request is for: the door of the HTTP application.

Without a key file everybody may, and the header x-mooncake-tenant names the tenant. With one, every request but those to
/health and /ready needs `Authorization: Bearer mk-...`, and the key says whose it is; only an admin key may name another tenant
by the header, as a proxy does for its own users, and read what is the operator's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol, Self

import msgspec

from mooncake.core.clock import monotonic
from mooncake.core.types import TENANT_SHARE_MAX
from mooncake.frontend.backend import Generate
from mooncake.frontend.errors import ApiError, bad_field
from mooncake.frontend.keyring import Keyring
from mooncake.frontend.keys import Key, Tenant, is_tenant_name
from mooncake.frontend.rate_limits import Meter, Meters, Refusal, Window

CALLER = "mooncake.caller"
"""Where a request's scope has its `Caller`."""
TENANT_HEADER = b"x-mooncake-tenant"
OPEN_PATHS = frozenset(("/health", "/ready"))
"""Load balancers and supervisors ask these, and they tell nothing of anybody."""
USER_PREFIXES = ("/v1/", "/tokenize", "/detokenize", "/openapi.json", "/docs")
"""What any key may call. The rest, metrics and pages for the operator, shows everybody's traffic: it takes an admin key."""

OPERATOR_PREFIXES = ("/admin/", "/dashboard")
"""The operator's: `mooncake.frontend.guard` watches over what they tell."""

Headers = Mapping[bytes, bytes]
HeaderList = list[tuple[bytes, bytes]]


class RateLimited(ApiError):
    """429 for a tenant's own limit; the other 429s are for everybody's load."""

    def __init__(self, refusal: Refusal, windows: Mapping[str, Window]) -> None:
        super().__init__(
            429,
            f"rate limit reached: {refusal.detail}; try again in {_duration(refusal.wait_ns)}",
            kind=refusal.limit,
            code="rate_limit_exceeded",
            retry_after_s=refusal.wait_ns / 1e9,
        )
        self._more = [(b"retry-after-ms", b"%d" % -(-refusal.wait_ns // 10**6)), *_window_headers(windows)]

    def headers(self) -> HeaderList:
        return [*super().headers(), *self._more]


class Unauthorized(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(401, message, code="invalid_api_key")

    def headers(self) -> HeaderList:
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


class Caller(msgspec.Struct):
    """Whom a request is for. priority_max: None: any. meter: counts what it uses; None: nobody limits it."""

    name: str = ""
    tenant: Tenant = Tenant()
    priority_max: int | None = None
    meter: Meter | None = None
    concurrent_max: int | None = None

    @property
    def share_scope(self) -> str:
        """Who reuses each other's KV: part of every block key. Names have no slash, so no two of these are equal by chance."""
        if self.tenant.share_group:
            return f"group/{self.tenant.share_group}"
        return f"tenant/{self.name}" if self.name else ""

    def enter(self) -> Visit:
        """Raises RateLimited. A visit that began has to be left."""
        if self.meter is not None:
            now = monotonic()
            refusal = self.meter.enter(self.concurrent_max, now)
            if refusal is not None:
                raise RateLimited(refusal, self.meter.windows(now))
        return Visit(self)


class Visit:
    """One request of a caller, as a context manager. num_output: tokens that were generated for it; without any it costs no
    tokens."""

    def __init__(self, caller: Caller) -> None:
        self.num_output = 0
        self._caller = caller
        self._num_taken = 0
        self._num_prompt = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._caller.meter is not None:
            used = self._num_prompt + self.num_output if self.num_output else 0
            self._caller.meter.leave(used - self._num_taken, monotonic())

    def admit(self, generate: Generate, announced: int | None) -> Generate:
        """The request as this caller may have it. announced: the client's own limit of output tokens, if it gave one. Raises
        ApiError."""
        caller = self._caller
        most = caller.priority_max
        if most is not None and generate.priority > most:
            raise bad_field("x-mooncake-priority", f"must be {most} or less for this API key, got {generate.priority}")
        if caller.meter is not None:
            now, count = monotonic(), len(generate.token_ids) + (announced or 0) * generate.n
            refusal = caller.meter.take_tokens(count, now)
            if refusal is not None:
                raise RateLimited(refusal, caller.meter.windows(now))
            self._num_taken += count
            self._num_prompt += len(generate.token_ids)
        return msgspec.structs.replace(
            generate, tenant=caller.name, share_scope=caller.share_scope, weight=caller.tenant.weight
        )

    def headers(self) -> HeaderList:
        """What is left to the caller now."""
        meter = self._caller.meter
        return _window_headers(meter.windows(monotonic())) if meter is not None else []


class Door(Protocol):
    def admit(self, path: str, headers: Headers) -> Caller:
        """Raises ApiError."""
        ...


class OpenDoor:
    def admit(self, path: str, headers: Headers) -> Caller:
        return Caller(_named_tenant(headers) or "")


class KeyedDoor:
    """num_running_max: requests that the frontend takes at once."""

    def __init__(self, keyring: Keyring, num_running_max: int, clock: Callable[[], float] = time.time) -> None:
        self._keyring = keyring
        self._clock = clock
        self._meters = Meters()
        self._share_max = max(1, int(num_running_max * TENANT_SHARE_MAX))

    def admit(self, path: str, headers: Headers) -> Caller:
        if path in OPEN_PATHS or path.startswith(OPERATOR_PREFIXES):
            return Caller()
        key = self._authenticate(headers)
        if not key.admin and not path.startswith(USER_PREFIXES):
            raise ApiError(403, f"{path[:200]} needs an admin key", code="insufficient_permissions")
        name = key.tenant
        named = _named_tenant(headers)
        if named is not None and named != name:
            if not key.admin:
                message = "this API key belongs to another tenant; only an admin key may name one"
                raise ApiError(403, message, param=TENANT_HEADER.decode(), code="tenant_not_allowed")
            name = named
        return self._caller(name)

    def _authenticate(self, headers: Headers) -> Key:
        scheme, _, text = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise Unauthorized("no API key was given; send it as 'Authorization: Bearer mk-...'")
        key = self._keyring.find(text.strip(), self._clock())
        if key is None:
            raise Unauthorized("the API key is not valid: unknown, revoked or expired")
        return key

    def _caller(self, name: str) -> Caller:
        tenant = self._keyring.tenants.get(name, Tenant())
        limits = tenant.limits
        concurrent_max = min(limits.concurrent_requests or self._share_max, self._share_max)
        meter = self._meters.of(name, limits, monotonic())
        return Caller(name, tenant, limits.priority_max, meter, concurrent_max)


def _named_tenant(headers: Headers) -> str | None:
    value = headers.get(TENANT_HEADER)
    if value is None:
        return None
    name = value.decode("latin-1")
    if not is_tenant_name(name):
        message = f"must be 1 to 64 letters, digits, '.', '_' or '-', got {name!r:.60}"
        raise bad_field(TENANT_HEADER.decode(), message)
    return name


def _window_headers(windows: Mapping[str, Window]) -> HeaderList:
    """As OpenAI names them."""
    headers: HeaderList = []
    for name, window in windows.items():
        for word, value in (
            ("limit", str(window.limit)),
            ("remaining", str(window.remaining)),
            ("reset", _duration(window.reset_ns)),
        ):
            headers.append((f"x-ratelimit-{word}-{name}".encode(), value.encode()))
    return headers


def _duration(time_ns: int) -> str:
    """As OpenAI writes them: 20ms, 1.5s, 6m0s; rounded up."""
    ms = -(-time_ns // 10**6)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
