"""Questions to the Conductor for the operator, each waited for with a deadline. They go over the frontend's one stream to it,
beside the dispatcher's messages.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from mooncake.core.errors import MooncakeError
from mooncake.core.messages import AnyMessage, AskExplain, AskHold, AskStatus, ClusterStatus, Told

ANSWERS = (ClusterStatus, Told)
Question = AskStatus | AskExplain | AskHold

NUM_OPEN_MAX = 64
"""Questions at a time: people ask them."""


class Unanswered(MooncakeError):
    """The Conductor is away, or does not know such questions."""


class Inquiries:
    """send: gives the message to the Conductor's link; False if there is none."""

    def __init__(self, send: Callable[[AnyMessage], bool], timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[ClusterStatus | Told]] = {}

    async def status(self) -> ClusterStatus:
        """Raises Unanswered, as the others do."""
        answer = await self._ask(AskStatus)
        assert isinstance(answer, ClusterStatus)
        return answer

    async def explain(self, frontend: str, request: int) -> Told:
        return await self._ask_told(lambda number: AskExplain(number, frontend, request))

    async def hold(self, name: str, held: bool) -> Told:
        return await self._ask_told(lambda number: AskHold(number, name, held))

    def answered(self, message: ClusterStatus | Told) -> None:
        """Who asked may have given up."""
        waiting = self._open.get(message.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    async def _ask_told(self, question: Callable[[int], Question]) -> Told:
        answer = await self._ask(question)
        assert isinstance(answer, Told)
        return answer

    async def _ask(self, question: Callable[[int], Question]) -> ClusterStatus | Told:
        if len(self._open) >= NUM_OPEN_MAX:
            raise Unanswered(f"{NUM_OPEN_MAX} questions to the Conductor are open already")
        number = next(self._numbers)
        waiting: asyncio.Future[ClusterStatus | Told] = asyncio.get_running_loop().create_future()
        self._open[number] = waiting
        try:
            if not self._send(question(number)):
                raise Unanswered("there is no connection to the Conductor")
            async with asyncio.timeout(self._timeout_s):
                return await waiting
        except TimeoutError:
            raise Unanswered(f"the Conductor did not answer within {self._timeout_s:g} s") from None
        finally:
            del self._open[number]
