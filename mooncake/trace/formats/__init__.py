"""The formats, sibling files of one shape."""

from __future__ import annotations

from mooncake.trace.formats.azure import Azure
from mooncake.trace.formats.bailian import Bailian
from mooncake.trace.formats.base import Format, WritableFormat
from mooncake.trace.formats.burstgpt import BurstGpt
from mooncake.trace.formats.mooncake import Mooncake

__all__ = ["FORMATS", "WRITABLE", "Format", "WritableFormat", "claimant"]

WRITABLE: dict[str, WritableFormat] = {each.format.name: each for each in (Mooncake(), Bailian())}
FORMATS: dict[str, Format] = {**WRITABLE, **{each.format.name: each for each in (Azure(), BurstGpt())}}


def claimant(line: bytes) -> Format | None:
    """The format that this line begins a trace of."""
    return next((each for each in FORMATS.values() if each.claims(line)), None)
