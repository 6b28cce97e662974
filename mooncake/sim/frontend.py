"""A frontend in virtual time: the real dispatcher, and what each client got of it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from mooncake.core.messages import AnyMessage, Prediction, Send
from mooncake.core.noise import noise
from mooncake.core.types import Job, SamplingParams, Slo
from mooncake.scheduler.dispatcher import (
    Cancel,
    Connect,
    Disconnect,
    Dispatcher,
    DispatcherLimits,
    Ended,
    Failure,
    Output,
    PeerGone,
    PeerOpened,
    Received,
    RequestSpec,
    Start,
    Tick,
)
from mooncake.sim.instance import TimedTokens
from mooncake.sim.loop import CoreRunner, Loop, Observer
from mooncake.sim.network import Network
from mooncake.sim.step_times import Times

FRONTEND_LOST = "frontend_lost"
CANCELLED = "cancelled"

_POSITION_BITS = 21
"""Of a token's 32; the others tell its request and choice apart from most others."""
_POSITION_MASK = (1 << _POSITION_BITS) - 1


class SimRequest(msgspec.Struct, frozen=True):
    """One request of a trace. output_length: after how many tokens the model stops, and each further choice one token later
    than the one before it; only the simulated engine knows it. block_keys: of the prompt's full blocks."""

    arrival_ns: int
    num_tokens: int
    output_length: int
    block_keys: tuple[bytes, ...]
    max_tokens: int = 1 << 20
    client_max_tokens: int | None = None
    tenant: str = ""
    priority: int = 0
    slo: Slo = Slo()
    timeout_ns: int = 600_000_000_000
    cancel_after_ns: int | None = None
    num_choices: int = 1
    weight: float = 1.0


class ChoiceRecord:
    """finish: stop or length, "" until then. Tokens and times are kept as they came, a piece each time, and are put together
    when asked for."""

    __slots__ = ("_pieces", "_tokens", "finish")

    def __init__(self) -> None:
        self.finish = ""
        self._tokens: list[tuple[int, ...]] = []
        self._pieces: list[tuple[Times, int]] = []

    def add(self, tokens: tuple[int, ...], computed: Times, now: int) -> None:
        """Tokens that reach the client now. Each of them is taken to have had the way that the last one had."""
        self._tokens.append(tokens)
        self._pieces.append((computed, now - computed[-1]))

    @property
    def tokens(self) -> list[int]:
        return [*chain.from_iterable(self._tokens)]

    @property
    def num_tokens(self) -> int:
        return sum([len(piece) for piece, _ in self._pieces])

    @property
    def times(self) -> list[int]:
        """When each token reached the client."""
        return [time + way for piece, way in self._pieces for time in piece]

    @property
    def computed(self) -> list[int]:
        return [time for piece, _ in self._pieces for time in piece]

    def time_array(self) -> np.ndarray:
        """`times`, as nanoseconds in an array."""
        computed: Times = array("q")
        for piece, _ in self._pieces:
            computed += piece
        times = np.array(computed)
        first = 0
        for piece, way in self._pieces:
            times[first : first + len(piece)] += way
            first += len(piece)
        return times

    @property
    def first_way(self) -> int:
        """How long the first token was on its way, of those that have one."""
        return self._pieces[0][1]


class RequestRecord:
    """What happened to a request. outcome: stop or length (of the choice that ended last), cancelled, frontend_lost or the
    reason of a failure; "" as long as it runs."""

    __slots__ = (
        "cached_tokens", "choices", "decode", "detail", "num_attempts", "number", "outcome", "prediction", "prefill",
        "request", "timeline",
    )  # fmt: skip

    def __init__(self, number: int, request: SimRequest) -> None:
        self.number = number
        self.request = request
        self.outcome = ""
        self.detail = ""
        self.choices = tuple(ChoiceRecord() for _ in range(request.num_choices))
        self.timeline: tuple[int | None, ...] = ()
        self.prefill = self.decode = ""
        self.prediction = Prediction()
        self.num_attempts = 0
        self.cached_tokens = 0

    @property
    def completed(self) -> bool:
        return self.outcome in ("stop", "length")

    @property
    def tokens(self) -> list[int]:
        """Of the first choice; `times` and `computed` likewise."""
        return self.choices[0].tokens

    @property
    def times(self) -> list[int]:
        return self.choices[0].times

    @property
    def computed(self) -> list[int]:
        return self.choices[0].computed

    def stop_position(self, choice: int) -> int:
        return self.request.num_tokens + self.request.output_length + choice - 1

    def stop_tokens(self) -> tuple[int, ...]:
        """Of each choice the token at which it stops."""
        stops = [(choice, self.stop_position(choice)) for choice in range(self.request.num_choices)]
        return tuple([token_range(self.number, choice, at, at + 1)[0] for choice, at in stops])

    def expected_tokens(self, choice: int = 0) -> list[int]:
        start = self.request.num_tokens
        end = min(self.stop_position(choice) + 1, start + self.request.max_tokens)
        return list(token_range(self.number, choice, start, end))

    def end(self, outcome: str, detail: str = "") -> None:
        assert not self.outcome, f"request {self.number} ends as {outcome} after it ended as {self.outcome}"
        self.outcome, self.detail = outcome, detail


def token_range(number: int, choice: int, first: int, last: int) -> range:
    """Tokens at the positions [first, last) of an output; they tell the output and the position apart from others."""
    base = noise(number, choice, 0) % (1 << 11) << _POSITION_BITS
    return range(base + first, base + last)


class Model:
    """The oracle of the simulated engines. A stop token tells the position at which it is drawn, so no record is needed."""

    def tokens(self, job: Job, choice: int, first: int, last: int) -> tuple[int, ...]:
        return tuple(token_range(job.key.request, choice, first, last))

    def num_left(self, job: Job, position: int) -> int:
        stop = job.sampling.stop_token_ids[job.key.choice] & _POSITION_MASK
        return max(1, stop + 1 - position)


def extend_keys(block_tokens: int) -> Callable[[RequestSpec, list[int]], tuple[bytes, ...]]:
    """Keys of blocks that end in generated tokens: there is no prompt to hash, so the request's number stands in."""

    def extend(spec: RequestSpec, generated: list[int]) -> tuple[bytes, ...]:
        num_blocks = (spec.num_tokens + len(generated)) // block_tokens
        own = (f"{spec.number}/{at}".encode() for at in range(len(spec.block_keys), num_blocks))
        return spec.block_keys + tuple(hashlib.blake2b(name, digest_size=16).digest() for name in own)

    return extend


class SimFrontend:
    def __init__(
        self,
        name: str,
        limits: DispatcherLimits,
        block_tokens: int,
        loop: Loop,
        network: Network,
        observe: Observer | None,
        on_ended: Callable[[RequestRecord], None],
    ) -> None:
        self.name = name
        self.core = Dispatcher(name, limits, extend_keys(block_tokens))
        self._loop = loop
        self._network = network
        self._on_ended = on_ended
        self._running: dict[int, RequestRecord] = {}
        self._times: dict[tuple[int, int], Times] = {}
        """By request and choice, when the tokens of the message being handled were computed."""
        actions: dict[type, Callable[[Any], None]] = {
            Send: lambda command: network.send(self.name, command.to, command.message),
            Output: self._output,
            Failure: lambda command: self._running[command.number].end(command.reason, command.detail),
            Ended: self._ended,
            Connect: lambda command: network.dial(self.name, command.instance.name),
            Disconnect: lambda command: network.hang_up(self.name, command.peer),
        }
        self.runner = CoreRunner(loop, name, self.core, actions, Tick(), observe)

    # ------------------------------------------------------------------ clients

    def start(self, record: RequestRecord) -> None:
        request = record.request
        self._running[record.number] = record
        spec = RequestSpec(
            number=record.number,
            num_tokens=request.num_tokens,
            token_ids=b"",
            root_key=b"",
            block_keys=request.block_keys,
            sampling=SamplingParams(seed=record.number, stop_token_ids=record.stop_tokens()),
            max_tokens=request.max_tokens,
            client_max_tokens=request.client_max_tokens,
            tenant=request.tenant,
            priority=request.priority,
            slo=request.slo,
            timeout_ns=request.timeout_ns,
            num_choices=request.num_choices,
            weight=request.weight,
        )
        self.runner.handle(Start(spec))
        if request.cancel_after_ns is not None:
            self._loop.after(request.cancel_after_ns, self._cancel, record)

    def _cancel(self, record: RequestRecord) -> None:
        if self.runner.alive and not record.outcome:
            record.end(CANCELLED)
            self.runner.handle(Cancel(record.number))

    def _output(self, output: Output) -> None:
        record = self._running[output.number]
        assert not record.outcome, f"tokens of request {output.number} after its end"
        choice = record.choices[output.choice]
        assert not choice.finish, f"tokens of choice {output.choice} of request {output.number} after its end"
        times = self._times[output.number, output.choice]
        choice.add(output.token_ids, times[-len(output.token_ids) :], self._loop.now)
        if output.cached_tokens is not None:
            record.cached_tokens = output.cached_tokens
        if output.finish is not None:
            choice.finish = output.finish.value
            if all(each.finish for each in record.choices):
                record.end(choice.finish)

    def _ended(self, ended: Ended) -> None:
        record = self._running.pop(ended.number)
        assert record.outcome, f"request {ended.number} ends without a reason"
        record.timeline = ended.timeline
        record.prefill, record.decode = ended.prefill, ended.decode
        record.num_attempts = ended.num_attempts
        record.prediction = ended.prediction
        self._on_ended(record)

    # ------------------------------------------------------------------ process

    def kill(self) -> None:
        """Its clients see their connections break."""
        self.runner.stop()
        for record in self._running.values():
            if not record.outcome:
                record.end(FRONTEND_LOST)
            self._on_ended(record)
        self._running.clear()

    def opened(self, peer: str) -> None:
        self.runner.handle(PeerOpened(peer))

    def gone(self, peer: str) -> None:
        self.runner.handle(PeerGone(peer))

    def received(self, sender: str, messages: list[AnyMessage | TimedTokens]) -> None:
        for message in messages:
            if isinstance(message, TimedTokens):
                self._times, message = message.times, message.message
            self.runner.handle(Received(sender, message))
