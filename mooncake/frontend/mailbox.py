"""The usual `Generation`: outputs are put in by the dispatcher and taken out by the HTTP response.

Putting never waits, so decode never waits for a client; what a slow client leaves here is bounded by max_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mooncake.core.messages import TokenOutput
from mooncake.frontend.backend import BackendError
from mooncake.scheduler.dispatcher import Route


class Mailbox:
    """on_cancel is called with a choice, or None for all that are left: at most once for each, and not after its last output
    or an error was put in."""

    __slots__ = ("_error", "_on_cancel", "_outputs", "_running", "_waiter", "route")

    def __init__(self, on_cancel: Callable[[int | None], None], num_choices: int) -> None:
        self.route: Route | None = None
        self._on_cancel = on_cancel
        self._outputs: list[TokenOutput] = []
        self._error: BackendError | None = None
        self._running = set(range(num_choices))
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        """Outputs after the end of their choice are dropped."""
        if output.key.choice not in self._running:
            return
        self._outputs.append(output)
        if output.finish is not None:
            self._running.remove(output.key.choice)
        self._wake()

    def fail(self, error: BackendError) -> None:
        """The outputs so far are still delivered before the error."""
        if not self._running:
            return
        self._error = error
        self._running.clear()
        self._wake()

    def cancel(self, choice: int | None = None) -> None:
        if choice is None and self._running:
            self._running.clear()
            self._outputs.clear()
        elif choice in self._running:
            self._running.remove(choice)
            self._outputs = [output for output in self._outputs if output.key.choice != choice]
        else:
            return
        self._on_cancel(choice)
        if not self._running:
            self._wake()

    async def next(self) -> list[TokenOutput]:
        while not self._outputs and self._running:
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
