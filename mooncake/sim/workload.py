"""From the requests of a trace to those of the simulator, one at a time, so that a trace may be longer than memory.

Blocks: a trace names blocks of its own length, a cluster has another. Where the cluster's are longer, the id at the end of each
names it, as ids stand for whole prefixes. Where they are shorter, each id names several; what two prompts share within their
first differing block of the trace is then not seen. Only full blocks have keys.

Clock: timestamps of a coarse clock bring many requests at once. Jitter moves each to a random time within the step, and keeps
their order.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import random
from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from mooncake.core.errors import ConfigError
from mooncake.core.types import NANOS_PER_S, Slo
from mooncake.sim.frontend import SimRequest
from mooncake.trace.types import TraceFormat, TraceRequest

START_NS = 2 * NANOS_PER_S
"""When the first request arrives: by then all processes of the cluster know each other."""
KEY_BYTES = 16
_KEYS_MAX = 1 << 16


class Workload(msgspec.Struct, frozen=True):
    """limit: requests from the beginning. speed: how much faster than in the trace they come. jitter_ns: of the trace's time.
    reuse: whether equal prefixes count as such. output_length: of every request, instead of the trace's."""

    limit: int | None = None
    speed: float = 1.0
    jitter_ns: int = 0
    seed: int = 0
    slo: Slo = Slo()
    timeout_ns: int = 600 * NANOS_PER_S
    reuse: bool = True
    output_length: int | None = None


def check_blocks(trace: TraceFormat, block_tokens: int) -> None:
    """Raises ConfigError."""
    own = trace.block_tokens
    if own is not None and own % block_tokens and block_tokens % own:
        raise ConfigError(
            f"block_tokens = {block_tokens}: neither a multiple nor a part of the trace's blocks of {own} tokens"
        )


def sim_requests(
    requests: Iterable[TraceRequest], trace: TraceFormat, block_tokens: int, workload: Workload
) -> Iterator[SimRequest]:
    """In the order in which they arrive."""
    timed = jittered(requests, workload.jitter_ns, random.Random(workload.seed))
    own = trace.block_tokens if workload.reuse else None
    for number, (at, request) in enumerate(timed):
        if number == workload.limit:
            return
        num_blocks = request.input_length // block_tokens
        if request.hash_ids is None or own is None:
            keys = tuple([_private_key(number, index) for index in range(num_blocks)])
        else:
            keys = block_keys(request.hash_ids, own, block_tokens, num_blocks)
        yield SimRequest(
            arrival_ns=START_NS + round(at / workload.speed),
            num_tokens=request.input_length,
            output_length=workload.output_length or request.output_length,
            block_keys=keys,
            slo=workload.slo,
            timeout_ns=workload.timeout_ns,
        )


def block_keys(hash_ids: tuple[int, ...], own_tokens: int, block_tokens: int, num_blocks: int) -> tuple[bytes, ...]:
    """Of the prompt's first num_blocks blocks of block_tokens; hash_ids are of blocks of own_tokens."""
    if block_tokens >= own_tokens:
        step = block_tokens // own_tokens
        return tuple([_key(each) for each in hash_ids[step - 1 : step * num_blocks : step]])
    parts = own_tokens // block_tokens
    return tuple([_part_key(hash_ids[at // parts], at % parts) for at in range(num_blocks)])


def jittered(
    requests: Iterable[TraceRequest], jitter_ns: int, rng: random.Random
) -> Iterator[tuple[int, TraceRequest]]:
    """Each with a time up to jitter_ns later than its own. The earliest time goes to the first request and so on: nobody comes
    before its own time, as so many times are as early."""
    if not jitter_ns:
        for request in requests:
            yield request.arrival_ns, request
        return
    times: list[int] = []
    waiting: deque[TraceRequest] = deque()
    for request in requests:
        while times and times[0] <= request.arrival_ns:
            yield heapq.heappop(times), waiting.popleft()
        heapq.heappush(times, request.arrival_ns + rng.randrange(jitter_ns))
        waiting.append(request)
    while times:
        yield heapq.heappop(times), waiting.popleft()


@functools.lru_cache(maxsize=_KEYS_MAX)
def _key(hash_id: int) -> bytes:
    """The same object for prompts that share it soon after each other: whoever looks it up need not compare its bytes."""
    return hash_id.to_bytes(KEY_BYTES, "little", signed=True)


def _part_key(hash_id: int, part: int) -> bytes:
    return hashlib.blake2b(b"%d/%d" % (hash_id, part), digest_size=KEY_BYTES).digest()


def _private_key(number: int, index: int) -> bytes:
    """Nobody else's; no hash id becomes such a key."""
    return hashlib.blake2b(b"no id %d/%d" % (number, index), digest_size=KEY_BYTES).digest()
