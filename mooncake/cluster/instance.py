"""The process of an instance, in whatever role: it begins in that of its configuration, and can change to the other."""

from __future__ import annotations

from mooncake.config import Config, RoleConfig
from mooncake.core.types import Role
from mooncake.decode import service as decode
from mooncake.engine.instance import run_instance
from mooncake.metrics import Registry
from mooncake.prefill import service as prefill
from mooncake.status import Status


async def run(config: Config, role: RoleConfig, status: Status, registry: Registry) -> None:
    """Until cancelled."""
    roles = {Role.PREFILL: prefill.role_parts(config), Role.DECODE: decode.role_parts(config)}
    await run_instance(config, role, status, registry, roles)
