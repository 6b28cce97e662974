"""A frontend in virtual time: the real dispatcher, and what each client got of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake.core.messages import AnyMessage, Send
from mooncake.core.types import Job, SamplingParams, Slo
from mooncake.engine.simulated import draw_token
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

STOP_TOKEN = 2
FRONTEND_LOST = "frontend_lost"
CANCELLED = "cancelled"


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


class ChoiceRecord:
    """times: when each token reached the client; computed: when it was computed. finish: stop or length, "" until then."""

    __slots__ = ("computed", "finish", "times", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[int] = []
        self.computed: list[int] = []
        self.finish = ""


class RequestRecord:
    """What happened to a request. outcome: stop or length (of the choice that ended last), cancelled, frontend_lost or the
    reason of a failure; "" as long as it runs."""

    __slots__ = (
        "cached_tokens", "choices", "decode", "detail", "num_attempts", "number", "outcome", "prefill", "request",
        "timeline",
    )  # fmt: skip

    def __init__(self, number: int, request: SimRequest) -> None:
        self.number = number
        self.request = request
        self.outcome = ""
        self.detail = ""
        self.choices = tuple(ChoiceRecord() for _ in range(request.num_choices))
        self.timeline: tuple[int | None, ...] = ()
        self.prefill = self.decode = ""
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

    def expected_token(self, choice: int, position: int) -> int:
        return STOP_TOKEN if position == self.stop_position(choice) else draw_token(self.number, choice, position)

    def expected_tokens(self, choice: int = 0) -> list[int]:
        start = self.request.num_tokens
        end = min(self.stop_position(choice) + 1, start + self.request.max_tokens)
        return [self.expected_token(choice, position) for position in range(start, end)]

    def end(self, outcome: str, detail: str = "") -> None:
        assert not self.outcome, f"request {self.number} ends as {outcome} after it ended as {self.outcome}"
        self.outcome, self.detail = outcome, detail


class Model:
    """The oracle of the simulated engines."""

    def __init__(self, records: list[RequestRecord]) -> None:
        self._records = records

    def token(self, job: Job, choice: int, position: int) -> int:
        return self._records[job.key.request].expected_token(choice, position)

    def num_left(self, job: Job, position: int) -> int:
        return max(1, self._records[job.key.request].stop_position(job.key.choice) + 1 - position)


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
        observe: Observer,
        on_ended: Callable[[], None],
    ) -> None:
        self.name = name
        self.core = Dispatcher(name, limits, extend_keys(block_tokens))
        self.runner = CoreRunner(loop, name, self.core, self._perform, Tick(), observe)
        self._loop = loop
        self._network = network
        self._on_ended = on_ended
        self._running: dict[int, RequestRecord] = {}
        self._counts: dict[tuple[int, int], int] = {}
        """By request and choice, how many tokens the message being handled has, and when these were computed."""
        self._times: list[int] = []
        self._actions: dict[type, Callable[[Any], None]] = {
            Send: lambda command: network.send(self.name, command.to, command.message),
            Output: self._output,
            Failure: lambda command: self._running[command.number].end(command.reason, command.detail),
            Ended: self._ended,
            Connect: lambda command: network.dial(self.name, command.instance.name),
            Disconnect: lambda command: network.hang_up(self.name, command.peer),
        }

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
            sampling=SamplingParams(seed=record.number, stop_token_ids=(STOP_TOKEN,)),
            max_tokens=request.max_tokens,
            client_max_tokens=request.client_max_tokens,
            tenant=request.tenant,
            priority=request.priority,
            slo=request.slo,
            timeout_ns=request.timeout_ns,
            num_choices=request.num_choices,
        )
        self.runner.handle(Start(spec))
        if request.cancel_after_ns is not None:
            self._loop.after(request.cancel_after_ns, lambda: self._cancel(record))

    def _cancel(self, record: RequestRecord) -> None:
        if self.runner.alive and not record.outcome:
            record.end(CANCELLED)
            self.runner.handle(Cancel(record.number))

    def _output(self, output: Output) -> None:
        record = self._running[output.number]
        assert not record.outcome, f"tokens of request {output.number} after its end"
        choice = record.choices[output.choice]
        assert not choice.finish, f"tokens of choice {output.choice} of request {output.number} after its end"
        count = self._counts[output.number, output.choice]
        times = self._times[:count][-len(output.token_ids) :]
        shift = self._loop.now - times[-1]
        choice.tokens.extend(output.token_ids)
        choice.computed.extend(times)
        choice.times.extend(time + shift for time in times)
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
        self._on_ended()

    # ------------------------------------------------------------------ process

    def kill(self) -> None:
        """Its clients see their connections break."""
        self.runner.stop()
        for record in self._running.values():
            if not record.outcome:
                record.end(FRONTEND_LOST)
            self._on_ended()
        self._running.clear()

    def opened(self, peer: str) -> None:
        self.runner.handle(PeerOpened(peer))

    def gone(self, peer: str) -> None:
        self.runner.handle(PeerGone(peer))

    def received(self, sender: str, message: AnyMessage | TimedTokens) -> None:
        if isinstance(message, TimedTokens):
            self._times, message = message.times, message.message
            self._counts = {(o.key.request, o.key.choice): len(o.token_ids) for o in message.outputs}
        self.runner.handle(Received(sender, message))

    def _perform(self, command: Any) -> None:
        self._actions[type(command)](command)
