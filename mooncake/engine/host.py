"""A loaded model that an instance runs its sequences on, in whatever role."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from mooncake.core.types import CostModel, Job, Role
from mooncake.engine.attempts import EngineProgress, KvStored
from mooncake.engine.base import Engine, EngineLimits, KvLayout
from mooncake.engine.core import EngineLoad

OnProgress = Callable[[EngineProgress | KvStored], None]
"""Called from threads of the engine."""
OnFailure = Callable[[BaseException], None]
"""The engine is broken and will not run again; the process should end and be restarted. Called as OnProgress."""


class EngineCounts(msgspec.Struct, frozen=True):
    """The load of now, and what was done since the start. num_steps: None if the engine does not tell of steps and copies."""

    load: EngineLoad
    num_steps: int | None = None
    steps_ns: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0


class EngineHost(Protocol):
    """limits: those of the role that it was built for.

    stores_itself: whether its engine puts KV into the store by itself. Then services neither reserve room for it nor commit
    it: they look for it there."""

    layout: KvLayout
    limits: EngineLimits
    stores_itself: bool

    def measure(self) -> CostModel:
        """Calibrate: seconds. Called once, before `start`."""
        ...

    def start(self, role: Role, limits: EngineLimits, on_progress: OnProgress, on_failure: OnFailure) -> Engine:
        """The engine, which whoever asks for it closes."""
        ...

    def counts(self) -> EngineCounts:
        """Of the engine that was started, from any thread."""
        ...

    def refusal(self, job: Job) -> str | None:
        """Why the engine, in its role, could never run the job, or None."""
        ...

    def take_role(self, role: Role, limits: EngineLimits, on_replaced: Callable[[], None]) -> None:
        """Go on in another role, when all sequences have been released. on_replaced is called from a thread of the engine,
        after all that was told before. `refusal` speaks for the new role at once."""
        ...
