"""What the HTTP application asks of the cluster behind it.

Two implementations: `service` (the live dispatcher) and `echo` (in-process, deterministic, for tests and benchmarks).
All methods are called from the event loop's thread and never block.

    MooncakeError
     +- BackendError      a request was not served
         +- Overloaded      not now; come back after retry_after_s          429
         +- PromptTooLong   no instance could ever run it                   400
         +- GrammarLost     its grammar cannot be followed                  400
         +- Unavailable     nothing to run it on, or shutting down          503
         +- Failed          it was accepted and then failed                 500
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from mooncake.core.errors import MooncakeError
from mooncake.core.messages import TokenOutput
from mooncake.core.types import SamplingParams, Slo
from mooncake.scheduler.dispatcher import Route


class BackendError(MooncakeError):
    """A request was not served; the message is for the client."""


class Overloaded(BackendError):
    """reason: a word of `messages.Rejected`, for programs."""

    def __init__(self, retry_after_s: float, detail: str, reason: str = "overloaded") -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s
        self.reason = reason


class PromptTooLong(BackendError):
    pass


class GrammarLost(BackendError):
    pass


class Unavailable(BackendError):
    pass


class Failed(BackendError):
    pass


class Generate(msgspec.Struct, frozen=True):
    """A validated request. n: number of choices, told apart by `TokenOutput.key.choice`."""

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    n: int = 1
    tenant: str = ""
    salt: str = ""
    share_scope: str = ""
    """Whose KV it may reuse: the caller's tenant or share group; "" is a scope too."""
    weight: float = 1.0
    """The tenant's share under load, beside those of the others."""
    priority: int = 0
    slo: Slo = Slo()
    timeout_s: float = 600.0
    traceparent: str = ""
    """The header of that name, unchecked: where the client's trace goes on."""


class ModelInfo(msgspec.Struct, frozen=True):
    """max_context: longest sequence of prompt and output, in tokens. vocab_size: valid token ids are below it."""

    name: str
    max_context: int
    vocab_size: int
    fingerprint: str
    created: int
    """Unix seconds, as /v1/models shows it."""


class BackendStatus(msgspec.Struct, frozen=True):
    """reason: one sentence, why not ready; empty when ready. instances: ready ones by role."""

    ready: bool
    reason: str = ""
    instances: dict[str, int] = {}


class Generation(Protocol):
    """A request under way."""

    @property
    def route(self) -> Route | None:
        """Where it runs, known with the first output, if the backend has such a thing."""
        ...

    async def next(self) -> list[TokenOutput]:
        """All outputs that wait, in order; waits if there are none. The last one of each choice carries `finish`. Each
        position of a choice comes once, whatever attempts failed behind it. Raises BackendError in place of further
        outputs. Empty only after `cancel`. The backend keeps the deadline: this never waits for longer than
        `Generate.timeout_s`."""
        ...

    def cancel(self, choice: int | None = None) -> None:
        """Give one choice that has had outputs up, or (None) the whole request, and free everything; nothing of it follows.
        The end of the last choice wakes a waiting `next`. Idempotent; no effect after the end."""
        ...


class Backend(Protocol):
    @property
    def model(self) -> ModelInfo: ...

    def start(self, generate: Generate) -> Generation:
        """Raises BackendError if it can tell at once; otherwise the first `next` does."""
        ...

    def status(self) -> BackendStatus: ...
