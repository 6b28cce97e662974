"""What the scheduler's side tells the workers' side in one step."""

from __future__ import annotations

import msgspec


class FetchPlan(msgspec.Struct, frozen=True):
    """Have tokens [start, end) of a request ready to be loaded: leased or fetched, and compared with their checksums. keys:
    block keys of the request's objects, from the first on. num_tokens: what all its objects hold together."""

    number: int
    start: int
    end: int
    num_tokens: int
    keys: tuple[bytes, ...]


class LoadPlan(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) of what was fetched under that number into the request's pages. pages: from its first token
    on. ahead: no step computes on top of it before it is told as loaded; else this one does, layer by layer."""

    request: str
    number: int
    start: int
    end: int
    pages: tuple[int, ...]
    ahead: bool


class SavePlan(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) of a request out of its pages, which the step fills. Otherwise as those above."""

    request: str
    start: int
    end: int
    num_tokens: int
    keys: tuple[bytes, ...]
    pages: tuple[int, ...]


class StepPlans(msgspec.Struct, frozen=True):
    """dropped: numbers of fetches that nobody wants any more. preempted: requests
    whose pages may be somebody else's after this."""

    fetches: tuple[FetchPlan, ...] = ()
    dropped: tuple[int, ...] = ()
    loads: tuple[LoadPlan, ...] = ()
    saves: tuple[SavePlan, ...] = ()
    preempted: tuple[str, ...] = ()
