"""What an instance is told of its end in a role."""

from __future__ import annotations

import pytest

from mooncake.core.messages import ChangeRole
from mooncake.core.types import Role
from mooncake.engine.service_life import ServiceLife
from tests.engine.jobs import make_info

INFO = make_info(Role.PREFILL)
TO_DECODE = ChangeRole(INFO.name, INFO.epoch, Role.DECODE)


def test_it_drains_and_then_takes_the_role_once() -> None:
    life = ServiceLife(INFO)
    assert not life.draining
    assert life.change_role(TO_DECODE)
    assert (life.draining, life.next_role) == (True, Role.DECODE)
    assert not life.change_role(TO_DECODE), "told again"
    assert life.leave() is Role.DECODE
    assert (life.draining, life.next_role) == (True, None)


def test_a_process_that_stops_takes_no_other_role() -> None:
    life = ServiceLife(INFO)
    assert life.change_role(TO_DECODE)
    life.drain()
    assert (life.draining, life.next_role) == (True, None)
    assert not life.change_role(TO_DECODE)


@pytest.mark.parametrize(
    "message",
    [ChangeRole(INFO.name, INFO.epoch + 1, Role.DECODE), ChangeRole(INFO.name, INFO.epoch, Role.PREFILL)],
    ids=["of another life", "its own role"],
)
def test_what_is_not_meant_for_it_changes_nothing(message: ChangeRole) -> None:
    life = ServiceLife(INFO)
    assert not life.change_role(message)
    assert (life.draining, life.next_role) == (False, None)
