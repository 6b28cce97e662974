"""The usual `Generation`: outputs are put in by the dispatcher and taken out by the HTTP response.

Putting never waits, so decode never waits for a client; what a slow client leaves here is bounded by max_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mooncake.core.messages import TokenOutput
from mooncake.frontend.backend import BackendError


class Mailbox:
    """on_cancel is called at most once, and not after the last output or an error was put in."""

    __slots__ = ("_ended", "_error", "_on_cancel", "_outputs", "_waiter")

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        self._outputs: list[TokenOutput] = []
        self._error: BackendError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        """Outputs after the end are dropped."""
        if self._ended:
            return
        self._outputs.append(output)
        self._ended = output.finish is not None
        self._wake()

    def fail(self, error: BackendError) -> None:
        """The outputs so far are still delivered before the error."""
        if self._ended:
            return
        self._error, self._ended = error, True
        self._wake()

    def cancel(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._outputs.clear()
        self._on_cancel()
        self._wake()

    async def next(self) -> list[TokenOutput]:
        if not self._outputs and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._outputs and self._error is not None:
            raise self._error
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
