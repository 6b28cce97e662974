"""Rate limits of tenants: requests and tokens per minute, and requests at once. Sans-IO: the time is passed in.

A bucket holds what may be used at once, at most a minute's worth, and fills evenly. Levels are whole units of 1/minute
nanoseconds, so nothing is lost to rounding and "come back in so many seconds" is exact.

A request's tokens are its prompt and the output that it asked for, taken when it is admitted; what it did not generate is given
back at its end. Output that nobody announced is taken at the end, and a request that is larger than a whole bucket is admitted
by a full one: both may leave a bucket in debt, which it has to fill first. So over time the rate is kept exactly.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MINUTE_NS = 60 * 10**9
_BUSY_RETRY_NS = 10**9
"""When one of the running requests will end is not known."""


Limit = Annotated[int, Meta(ge=1, le=10**15)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of a tenant, over all its keys. None: no limit. store_bytes is for store nodes."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    priority_max: Annotated[int, Meta(ge=-100, le=100)] = 0
    store_bytes: Limit | None = None


class Window(msgspec.Struct, frozen=True):
    """What a client is told of one limit."""

    limit: int
    remaining: int
    reset_ns: int
    """Until all of it can be used again."""


class Refusal(msgspec.Struct, frozen=True):
    """limit: which one; wait_ns: after so long the same request would be admitted, if nothing else came."""

    limit: str
    detail: str
    wait_ns: int


class Bucket:
    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: int) -> None:
        self.limit = limit
        self._level = limit * MINUTE_NS
        self._at = now

    def set_limit(self, limit: int, now: int) -> None:
        self._fill(now)
        self._level = min(self._level, limit * MINUTE_NS)
        self.limit = limit

    def wait_ns(self, count: int, now: int) -> int:
        """Until so many can be taken; 0: now. More than a bucket holds can be taken from a full one."""
        self._fill(now)
        missing = min(count, self.limit) * MINUTE_NS - self._level
        return max(0, -(-missing // self.limit))

    def take(self, count: int, now: int) -> None:
        """Gives back if negative."""
        self._fill(now)
        self._level = min(self._level - count * MINUTE_NS, self.limit * MINUTE_NS)

    def window(self, now: int) -> Window:
        self._fill(now)
        missing = self.limit * MINUTE_NS - self._level
        return Window(self.limit, max(0, self._level // MINUTE_NS), -(-missing // self.limit))

    def _fill(self, now: int) -> None:
        self._level = min(self._level + (now - self._at) * self.limit, self.limit * MINUTE_NS)
        self._at = now


class Meter:
    """One tenant's use."""

    def __init__(self) -> None:
        self.num_running = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def set_limits(self, limits: Limits, now: int) -> None:
        self._requests = _adjusted(self._requests, limits.requests_per_minute, now)
        self._tokens = _adjusted(self._tokens, limits.tokens_per_minute, now)

    def enter(self, concurrent_max: int | None, now: int) -> Refusal | None:
        """A request comes, before anything of it was read. It runs if it is not refused, until `leave`."""
        if concurrent_max is not None and self.num_running >= concurrent_max:
            detail = f"{self.num_running} requests of this tenant are running, of {concurrent_max} allowed"
            return Refusal("concurrent_requests", detail, _BUSY_RETRY_NS)
        requests = self._requests
        if requests is not None:
            wait_ns = requests.wait_ns(1, now)
            if wait_ns:
                return Refusal("requests", f"the limit is {requests.limit} requests per minute", wait_ns)
            requests.take(1, now)
        self.num_running += 1
        return None

    def take_tokens(self, count: int, now: int) -> Refusal | None:
        tokens = self._tokens
        if tokens is None:
            return None
        wait_ns = tokens.wait_ns(count, now)
        if wait_ns:
            detail = f"the limit is {tokens.limit} tokens per minute, and this request has {count}"
            return Refusal("tokens", detail, wait_ns)
        tokens.take(count, now)
        return None

    def leave(self, correction: int, now: int) -> None:
        """correction: tokens used beyond those that were taken; negative: fewer."""
        self.num_running -= 1
        if self._tokens is not None and correction:
            self._tokens.take(correction, now)

    def windows(self, now: int) -> dict[str, Window]:
        """By what is limited."""
        buckets = {"requests": self._requests, "tokens": self._tokens}
        return {name: bucket.window(now) for name, bucket in buckets.items() if bucket is not None}

    def idle(self, now: int) -> bool:
        """Nothing would be lost if it were forgotten."""
        full = [bucket.wait_ns(bucket.limit, now) == 0 for bucket in (self._requests, self._tokens) if bucket]
        return not self.num_running and all(full)


def _adjusted(bucket: Bucket | None, limit: int | None, now: int) -> Bucket | None:
    if limit is None:
        return None
    if bucket is None:
        return Bucket(limit, now)
    if bucket.limit != limit:
        bucket.set_limit(limit, now)
    return bucket


class Meters:
    """All tenants'. When there are num_max, those are forgotten of whom nothing would be lost."""

    def __init__(self, num_max: int = 10_000) -> None:
        self._num_max = num_max
        self._meters: dict[str, Meter] = {}

    def __len__(self) -> int:
        return len(self._meters)

    def of(self, tenant: str, limits: Limits, now: int) -> Meter:
        meter = self._meters.get(tenant)
        if meter is None:
            if len(self._meters) >= self._num_max:
                self._meters = {name: other for name, other in self._meters.items() if not other.idle(now)}
            meter = self._meters[tenant] = Meter()
        meter.set_limits(limits, now)
        return meter
