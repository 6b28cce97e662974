"""Deadlines of sans-IO cores: times of the caller's clock, or None, which is never."""

from __future__ import annotations


def earliest(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
