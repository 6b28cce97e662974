"""The decode process: `DecodeCore` with an engine and the store. Turns commands into calls; decides nothing."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mooncake.config import Config, RoleConfig
from mooncake.core.types import InstanceInfo, Job, Role
from mooncake.decode.core import DecodeCore
from mooncake.engine.build import EngineParts
from mooncake.engine.instance import run_instance
from mooncake.status import Status


class DecodeSettings(msgspec.Struct, frozen=True):
    """What a `DecodeCore` is built from, as its event log keeps it. max_tokens: longest sequence the engine takes."""

    info: InstanceInfo
    max_queued: int
    max_tokens: int


async def run(config: Config, role: RoleConfig, status: Status) -> None:
    def make_core(
        info: InstanceInfo, refusal: Callable[[Job], str | None], parts: EngineParts
    ) -> tuple[DecodeCore, DecodeSettings]:
        limits = parts.step_engine.limits
        longest = min(limits.max_context, limits.num_pages * limits.page_tokens)
        settings = DecodeSettings(info, config.limits.queue, longest)
        return DecodeCore(info, settings.max_queued, refusal), settings

    await run_instance(config, role, status, Role.DECODE, make_core, lambda shell, store, parts: None)
