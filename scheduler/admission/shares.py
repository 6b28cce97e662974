"""Tenants' shares of what was placed lately, so that under overload one above its share is refused before one below.

Use decays by half in each half-life. A tenant's fair share is the use of all by the number of tenants that have any.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from mooncake.scheduler.config import Fairness

_NOTHING = 1.0
"""Tokens: less than this is no use."""
_PARTS = 64
"""Of a half-life: within one, uses of the same tenant in a row count as one."""
_HALF_LIVES_MAX = 500
"""After so many the numbers are begun anew, before they leave the range of floats."""


class Shares:
    """All decays alike, so instead of that what is new weighs more: a token twice as much after each half-life."""

    def __init__(self, config: Fairness) -> None:
        self._half_life_ns = config.half_life_ns
        self._num_tenants_max = config.num_tenants_max
        self._uses: OrderedDict[str, float] = OrderedDict()
        """Weighted tokens, least lately used first."""
        self._total = 0.0
        self._began_at = 0
        self._last = ""
        """The tenant of the last use, which is booked with those that follow it: tokens, until when."""
        self._last_tokens = 0.0
        self._last_until = 0

    def __len__(self) -> int:
        return len(self._uses)

    def spend(self, tenant: str, num_tokens: float, now: int) -> None:
        if tenant == self._last and now < self._last_until:
            self._last_tokens += num_tokens
            return
        self._book_last(now)
        self._last, self._last_until = tenant, now + self._half_life_ns // _PARTS
        self._book(tenant, num_tokens, now)

    def _book_last(self, now: int) -> None:
        if self._last_tokens:
            self._book(self._last, self._last_tokens, now)
            self._last_tokens = 0.0

    def _book(self, tenant: str, num_tokens: float, now: int) -> None:
        weight = self._weight(now)
        use, uses = num_tokens * weight, self._uses
        self._total += use
        if tenant in uses:
            use += uses[tenant]
            if len(uses) > 1:
                uses.move_to_end(tenant)
        uses[tenant] = use
        while len(uses) > 1:
            oldest = next(iter(uses))
            if uses[oldest] >= _NOTHING * weight and len(uses) <= self._num_tenants_max:
                break
            self._total = max(0.0, self._total - uses.pop(oldest))

    def ratio(self, tenant: str, now: int) -> float:
        """The tenant's use by its fair share; 1 if it is alone. Tokens that were divided by weights give shares by weight."""
        self._book_last(now)
        if len(self._uses) <= 1:
            return 0.0 if self._uses and tenant not in self._uses else 1.0
        return self._uses.get(tenant, 0.0) * len(self._uses) / self._total

    def _weight(self, now: int) -> float:
        num_half_lives = (now - self._began_at) / self._half_life_ns
        if num_half_lives > _HALF_LIVES_MAX:
            past = math.exp2(-num_half_lives)
            self._uses = OrderedDict((tenant, use * past) for tenant, use in self._uses.items())
            self._total *= past
            self._began_at = now
            return 1.0
        return math.exp2(num_half_lives)
