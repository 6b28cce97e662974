"""What a decode instance is: `DecodeCore` with an engine and the store. Turns commands into calls; decides nothing."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mooncake.config import Config
from mooncake.core.types import InstanceInfo, Job
from mooncake.decode.core import DecodeCore
from mooncake.engine.base import EngineLimits
from mooncake.engine.instance import RoleParts


class DecodeSettings(msgspec.Struct, frozen=True):
    """What a `DecodeCore` is built from, as its event log keeps it. max_tokens: longest sequence the engine takes."""

    info: InstanceInfo
    max_queued: int
    max_tokens: int


def role_parts(config: Config) -> RoleParts:
    def make_core(
        info: InstanceInfo, refusal: Callable[[Job], str | None], limits: EngineLimits
    ) -> tuple[DecodeCore, DecodeSettings]:
        longest = min(limits.max_context, limits.num_pages * limits.page_tokens)
        settings = DecodeSettings(info, config.limits.queue, longest)
        return DecodeCore(info, settings.max_queued, refusal), settings

    return RoleParts(make_core, lambda shell, store, parts: None)
