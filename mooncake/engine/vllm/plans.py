"""What the scheduler's side tells the workers' side in one step."""

from __future__ import annotations

import msgspec


class LoadPlan(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) of a request from these objects into its pages. keys: block keys of the request's objects, from
    the first on. pages: of the request, from its first token on. num_tokens: what all its objects hold together."""

    request: str
    start: int
    end: int
    num_tokens: int
    keys: tuple[bytes, ...]
    pages: tuple[int, ...]


class SavePlan(msgspec.Struct, frozen=True):
    """Copy tokens [start, end) of a request out of its pages, which the step fills. Otherwise as LoadPlan."""

    request: str
    start: int
    end: int
    num_tokens: int
    keys: tuple[bytes, ...]
    pages: tuple[int, ...]


class StepPlans(msgspec.Struct, frozen=True):
    """preempted: requests whose pages may be somebody else's after this."""

    loads: tuple[LoadPlan, ...] = ()
    saves: tuple[SavePlan, ...] = ()
    preempted: tuple[str, ...] = ()
