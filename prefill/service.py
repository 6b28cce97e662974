"""What a prefill instance is: `PrefillCore` with an engine and the store. Turns commands into calls; decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from mooncake.config import Config
from mooncake.core.errors import StoreError
from mooncake.core.keys import partial_key
from mooncake.core.types import InstanceInfo, Job, KvSource
from mooncake.engine.base import EngineLimits
from mooncake.engine.build import EngineParts
from mooncake.engine.instance import RoleParts
from mooncake.engine.kv_objects import StoredTarget, TargetWriter, reserve_target, watch_target
from mooncake.engine.shell import InstanceShell
from mooncake.prefill.core import (
    CommitKv,
    KvCommitted,
    KvReserved,
    PrefillCore,
    PrefillLimits,
    ReleaseKv,
    ReserveKv,
)
from mooncake.store.client import StoreClient

log = logging.getLogger(__name__)


class PrefillSettings(msgspec.Struct, frozen=True):
    """What a `PrefillCore` is built from, as its event log keeps it. max_tokens: longest sequence the engine takes."""

    info: InstanceInfo
    limits: PrefillLimits
    block_tokens: int
    max_tokens: int


def role_parts(config: Config) -> RoleParts:
    def make_core(
        info: InstanceInfo, refusal: Callable[[Job], str | None], limits: EngineLimits
    ) -> tuple[PrefillCore, PrefillSettings]:
        settings = PrefillSettings(
            info,
            PrefillLimits(max_queued=config.limits.queue, max_started=limits.max_batch),
            config.block_tokens,
            min(limits.max_context, limits.num_pages * limits.page_tokens),
        )
        core = PrefillCore(info, settings.limits, settings.block_tokens, attempt_partial_key, refusal)
        return core, settings

    return RoleParts(make_core, _add_actions)


def attempt_partial_key(job: Job) -> bytes:
    """Of one attempt alone: its content depends on no more than the sequence, but its life is the attempt's."""
    key = job.key
    return partial_key(b"".join(job.block_keys[-1:]), key.frontend, key.request, key.choice, key.attempt)


def _add_actions(shell: InstanceShell, store: StoreClient, parts: EngineParts) -> None:
    actions = _StoreActions(shell, store, parts)
    shell.add_action(ReserveKv, lambda command: shell.spawn(actions.reserve(command)))
    shell.add_action(CommitKv, lambda command: shell.spawn(actions.commit(command)))
    shell.add_action(ReleaseKv, lambda command: shell.spawn(actions.release(command)))


class _StoreActions:
    def __init__(self, shell: InstanceShell, store: StoreClient, parts: EngineParts) -> None:
        self._shell = shell
        self._store = store
        self._host = parts.host

    async def reserve(self, command: ReserveKv) -> None:
        writer = None
        reachable = True
        try:
            writer = await self._open(command.target, command.tenant)
        except StoreError as error:
            log.warning("reserve: %s", error)
            reachable = False
        if writer is not None:
            self._shell.writers[command.seq] = writer
        num_stored = 0 if writer is None else writer.num_stored
        self._shell.driver.handle(KvReserved(command.seq, writer is not None, reachable, num_stored))

    async def _open(self, target: KvSource, tenant: str) -> TargetWriter | StoredTarget | None:
        shell, layout = self._shell, self._host.layout
        if self._host.stores_itself:
            return await watch_target(self._store, target, shell.shard)
        return await reserve_target(self._store, target, layout, shell.shard, shell.block_tokens, tenant)

    async def commit(self, command: CommitKv) -> None:
        ok = False
        try:
            ok = await self._shell.writers[command.seq].commit(command.first, command.last)
        except StoreError as error:
            log.warning("commit: %s", error)
        self._shell.driver.handle(KvCommitted(command.seq, command.first, command.last, ok))

    async def release(self, command: ReleaseKv) -> None:
        await self._shell.writers.pop(command.seq).close()
