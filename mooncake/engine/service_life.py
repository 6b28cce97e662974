"""Whether an instance takes new work, and in which role it goes on when it has none left."""

from __future__ import annotations

from mooncake.core.messages import ChangeRole
from mooncake.core.types import InstanceInfo, Role


class ServiceLife:
    """Of one epoch, which both kinds of cores go through alike.

    serving --drain--> draining
       +--change_role--> draining, next_role --the core is drained, `leave`--> draining
    """

    def __init__(self, info: InstanceInfo) -> None:
        self.draining = False
        self.next_role: Role | None = None
        self._info = info

    def drain(self) -> None:
        """The process is about to stop, so it takes no other role."""
        self.draining, self.next_role = True, None

    def change_role(self, message: ChangeRole) -> bool:
        """False: it is not meant for this epoch, or comes too late."""
        if message.epoch != self._info.epoch or message.role is self._info.role or self.draining:
            return False
        self.draining, self.next_role = True, message.role
        return True

    def leave(self) -> Role:
        """The role to take now. There must be one."""
        role, self.next_role = self.next_role, None
        assert role is not None
        return role
