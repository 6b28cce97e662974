"""The keys that the running frontend knows: the file, read again when it changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mooncake.core.errors import ConfigError
from mooncake.frontend.keys import Key, Tenant, find_key, read_keys

LOOK_AGAIN_S = 0.25
"""How old the knowledge of the file may be: so soon a revoked key is refused."""
_Stamp = tuple[int, int, int]
logger = logging.getLogger("mooncake.frontend")


class Keyring:
    """A file that has become unreadable changes nothing: the keys that were good before stay good, and the log says why."""

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._path = path
        self._monotonic = monotonic
        self._keys: dict[str, Key] = {}
        self._tenants: dict[str, Tenant] = {}
        self._stamp = _stamp(path)
        self._looked_at = monotonic()
        self._read()

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        return self._tenants

    def find(self, text: str, now_s: float) -> Key | None:
        """The key of that text if it is valid now."""
        self.refresh()
        found = find_key(self._keys, text)
        return found if found is not None and found.state(now_s) == "active" else None

    def refresh(self) -> None:
        now = self._monotonic()
        if now - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read()
        except ConfigError as error:
            logger.error("%s; the keys read before stay in force", error)

    def _read(self) -> None:
        content = read_keys(self._path)
        self._keys = {key.id: key for key in content.keys}
        self._tenants = content.tenants


def _stamp(path: Path) -> _Stamp | None:
    """Differs when the file was replaced or written to; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
