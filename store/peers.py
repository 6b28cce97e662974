"""The store nodes that a client speaks with: a session for each, and who had better be left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mooncake.core.messages import NodeInfo
from mooncake.store.session import NodeSession

REST_S = 1.0
"""How long a node that did not answer is asked only if there is no other."""
MAX_SESSIONS = 256


class Peers:
    """make: a session with a node that the directory has told of."""

    def __init__(self, make: Callable[[NodeInfo], NodeSession]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, int], NodeSession] = {}
        """By name and epoch: a new life of a node is another one."""
        self._resting: dict[str, float] = {}

    def session(self, info: NodeInfo) -> NodeSession:
        with self._lock:
            session = self._sessions.get((info.name, info.epoch))
            if session is None:
                self._drop(info.name)
                session = self._sessions[info.name, info.epoch] = self._make(info)
            return session

    def failed(self, name: str) -> None:
        self._resting[name] = time.monotonic() + REST_S

    def is_resting(self, name: str) -> bool:
        return self._resting.get(name, 0.0) > time.monotonic()

    def close(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def _drop(self, name: str) -> None:
        """Sessions with older lives, and the oldest of all if there are too many."""
        old = [each for each in self._sessions if each[0] == name]
        old += list(self._sessions)[: max(0, len(self._sessions) - len(old) + 1 - MAX_SESSIONS)]
        for each in old:
            self._sessions.pop(each).close()
