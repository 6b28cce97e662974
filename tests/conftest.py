"""Tests that run two at a time, and *quiet* ones, which want the machine for themselves: those with real processes, and such as
measure time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

LIVE = Path(__file__).parent / "live"

settings.register_profile("mooncake", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mooncake")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LIVE in item.path.parents:
            item.add_marker(pytest.mark.quiet)
