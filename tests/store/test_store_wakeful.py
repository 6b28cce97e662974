"""A loop that was stirred turns by itself for a while, and then sleeps."""

import asyncio
import time

from mooncake.store.wakeful import AWAKE_S, Wakeful


def test_it_turns_until_nothing_has_come_for_a_while_and_no_longer() -> None:
    async def run() -> tuple[int, float, int]:
        turns = 0
        ended_at = 0.0

        class Counted(Wakeful):
            def _turn(self) -> None:
                nonlocal turns, ended_at
                turns += 1
                super()._turn()
                ended_at = time.monotonic()

        wakeful, began = Counted(), time.monotonic()
        wakeful.stir()
        wakeful.stir()  # the same again, no second one
        await asyncio.sleep(20 * AWAKE_S)
        num_turns, lasted = turns, ended_at - began
        await asyncio.sleep(20 * AWAKE_S)
        return num_turns, lasted, turns - num_turns

    num_turns, lasted_s, later = asyncio.run(run())
    assert num_turns > 1 and lasted_s >= AWAKE_S and later == 0
