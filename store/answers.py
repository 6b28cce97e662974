"""What the answers of a `StoreCore` are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from mooncake.store.events import Command, Fault, Reply, Request, Results, fault_of
from mooncake.store.objects import pick
from mooncake.store.types import Places


def reply(event: Request, results: Results) -> list[Command]:
    return [Reply(event.client, event.request_id, results)]


def faults(event: Request, capacity: int) -> list[Command]:
    """The whole answer to a request that is invalid; empty for any other."""
    fault = fault_of(event, capacity)
    return [] if fault is None else [Fault(event.client, event.request_id, fault)]


def nowhere(count: int) -> Places:
    nothing = (None,) * count
    return Places(nothing, nothing, nothing)


def join(parts: Sequence[Places], at: Sequence[int]) -> Places:
    """One after the other; the i-th of them goes to at[i]."""
    order = sorted(range(len(at)), key=at.__getitem__)
    columns = zip(*[(part.offsets, part.sizes, part.numbers) for part in parts], strict=True)
    offsets, sizes, numbers = [pick(tuple(chain(*column)), order) for column in columns]
    if not any(part.checksums for part in parts):
        return Places(offsets, sizes, numbers)
    checksums = [part.checksums or (None,) * len(part) for part in parts]
    return Places(offsets, sizes, numbers, pick(tuple(chain(*checksums)), order))
