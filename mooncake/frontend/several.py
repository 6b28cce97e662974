"""Several prompts of one request: each is a generation of its own, and the client sees one, with the choices of all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from mooncake.core.messages import TokenOutput
from mooncake.frontend.backend import Generation
from mooncake.scheduler.dispatcher import Route


class Several:
    """n: choices of each; those of a prompt follow those of the one before it."""

    def __init__(self, generations: Sequence[Generation], n: int) -> None:
        self._generations = generations
        self._n = n
        self._left = [set(range(n)) for _ in generations]
        self._asked: dict[asyncio.Task[list[TokenOutput]], int] = {}

    @property
    def route(self) -> Route | None:
        """Of the first."""
        return self._generations[0].route

    async def next(self) -> list[TokenOutput]:
        waiting = set(self._asked.values())
        for at, generation in enumerate(self._generations):
            if self._left[at] and at not in waiting:
                task = asyncio.ensure_future(generation.next())
                task.add_done_callback(_retrieve)
                self._asked[task] = at
        if not self._asked:
            return []
        done, _ = await asyncio.wait(self._asked, return_when=asyncio.FIRST_COMPLETED)
        outputs: list[TokenOutput] = []
        for task in [task for task in self._asked if task in done]:
            at = self._asked.pop(task)
            outputs += [self._numbered(at, output) for output in task.result()]
        return outputs

    def cancel(self, choice: int | None = None) -> None:
        if choice is not None:
            at, own = divmod(choice, self._n)
            self._left[at].discard(own)
            self._generations[at].cancel(own)
            return
        for left, generation in zip(self._left, self._generations, strict=True):
            left.clear()
            generation.cancel()
        for task in self._asked:
            task.cancel()

    def _numbered(self, at: int, output: TokenOutput) -> TokenOutput:
        if output.finish is not None:
            self._left[at].discard(output.key.choice)
        return msgspec.structs.replace(output, key=output.key.of_choice(at * self._n + output.key.choice))


def _retrieve(task: asyncio.Task[list[TokenOutput]]) -> None:
    """An error of one prompt ends the request; nobody asks for those of the others."""
    if not task.cancelled():
        task.exception()
