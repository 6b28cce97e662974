"""The one place where the time is read. Cores get `now` as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Nanoseconds that never run backwards; only differences mean anything."""

monotonic: Clock = time.monotonic_ns
