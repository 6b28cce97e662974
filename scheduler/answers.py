"""What was answered, so that a question that is repeated gets the same answer: the last `num_max` answers."""

from __future__ import annotations

from collections import OrderedDict

from mooncake.core.messages import Placed, Rejected
from mooncake.core.types import AttemptKey


class Answers:
    def __init__(self, num_max: int) -> None:
        self._num_max = num_max
        self._known: OrderedDict[AttemptKey, Placed | Rejected] = OrderedDict()
        self._until: dict[AttemptKey, int] = {}
        """When a rejection no longer holds; none of a placement."""

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._known

    def find(self, key: AttemptKey, now: int) -> Placed | Rejected | None:
        """What was answered and still holds."""
        answer = self._known.get(key)
        if isinstance(answer, Rejected) and self._until[key] <= now:
            return None
        return answer

    def remember(self, key: AttemptKey, answer: Placed | Rejected, now: int) -> None:
        if key in self._known:
            self.forget(key)
        self._known[key] = answer
        if isinstance(answer, Rejected):
            self._until[key] = now + answer.retry_after_ns
        if len(self._known) > self._num_max:
            oldest, _answer = self._known.popitem(last=False)
            self._until.pop(oldest, None)

    def forget(self, key: AttemptKey) -> None:
        self._known.pop(key, None)
        self._until.pop(key, None)
