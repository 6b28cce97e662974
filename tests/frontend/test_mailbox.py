"""Outputs of several choices through one mailbox."""

from __future__ import annotations

import asyncio

import pytest

from mooncake.core.messages import TokenOutput
from mooncake.core.types import AttemptKey, FinishReason
from mooncake.frontend.backend import Failed
from mooncake.frontend.mailbox import Mailbox


def output(choice: int, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(AttemptKey("f", 1, choice), 0, (choice,), finish)


def test_it_ends_with_the_last_choice() -> None:
    async def test() -> None:
        cancelled: list[int | None] = []
        mailbox = Mailbox(cancelled.append, 3)
        mailbox.put(output(0, FinishReason.STOP))
        mailbox.put(output(0))
        mailbox.put(output(1))
        mailbox.put(output(2))
        mailbox.cancel(1)
        mailbox.cancel(1)
        mailbox.put(output(1))
        assert await mailbox.next() == [output(0, FinishReason.STOP), output(2)]
        mailbox.cancel(0)
        waiting = asyncio.create_task(mailbox.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(output(2, FinishReason.LENGTH))
        assert await waiting == [output(2, FinishReason.LENGTH)]
        mailbox.cancel()
        assert (await mailbox.next(), cancelled) == ([], [1])

    asyncio.run(test())


def test_giving_up_the_last_choice_wakes_who_waits() -> None:
    async def test() -> None:
        cancelled: list[int | None] = []
        mailbox = Mailbox(cancelled.append, 2)
        mailbox.put(output(0, FinishReason.STOP))
        await mailbox.next()
        waiting = asyncio.create_task(mailbox.next())
        await asyncio.sleep(0)
        mailbox.cancel()
        assert (await waiting, cancelled) == ([], [None])

    asyncio.run(test())


def test_an_error_comes_after_the_outputs_before_it() -> None:
    async def test() -> None:
        mailbox = Mailbox(lambda choice: None, 2)
        mailbox.put(output(1))
        mailbox.fail(Failed("broken"))
        mailbox.put(output(0))
        assert await mailbox.next() == [output(1)]
        with pytest.raises(Failed, match="broken"):
            await mailbox.next()

    asyncio.run(test())
