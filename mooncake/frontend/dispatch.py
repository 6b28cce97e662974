"""The live backend of the HTTP application: a `Dispatcher` with links to the Conductor and the instances.

Turns validated requests into events and the dispatcher's outputs into mailboxes; decides nothing.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from mooncake.core.clock import monotonic
from mooncake.core.keys import block_keys, root_key
from mooncake.core.messages import CONDUCTOR, AnyMessage, Send, TokenOutput
from mooncake.core.types import (
    NANOS_PER_S,
    AttemptKey,
    InstanceInfo,
    InstanceState,
    Role,
    tokens_to_bytes,
)
from mooncake.frontend.backend import (
    BackendError,
    BackendStatus,
    Failed,
    Generate,
    GrammarLost,
    ModelInfo,
    Overloaded,
    PromptTooLong,
    Unavailable,
)
from mooncake.frontend.inquiries import ANSWERS, Inquiries
from mooncake.frontend.mailbox import Mailbox
from mooncake.frontend.outcomes import Outcomes
from mooncake.rpc.driver import CoreDriver
from mooncake.scheduler.dispatcher import (
    Cancel,
    Connect,
    Disconnect,
    Dispatcher,
    Ended,
    Failure,
    Output,
    PeerGone,
    PeerOpened,
    Received,
    RequestSpec,
    Start,
)

log = logging.getLogger(__name__)


class Outbox(Protocol):
    """One end of a stream, as far as sending goes."""

    def send(self, message: AnyMessage) -> None: ...


class Dialer(Protocol):
    """Keeps a connection to each instance that it was told of."""

    def connect(self, instance: InstanceInfo) -> None: ...

    def disconnect(self, peer: str) -> None: ...


class DispatchBackend:
    """driver and dialer are set by the service before the first event, as they need this object to exist.

    first_number: above all request numbers of earlier lives of this name, or the Conductor would take new requests for
    repetitions. outcomes: told what becomes of requests. timeout_s: how long questions to the Conductor may take."""

    driver: CoreDriver
    dialer: Dialer

    def __init__(
        self,
        name: str,
        model: ModelInfo,
        block_tokens: int,
        first_number: int,
        outcomes: Outcomes,
        timeout_s: float = 5.0,
    ) -> None:
        self.model = model
        self.outcomes = outcomes
        self.inquiries = Inquiries(self._tell_conductor, timeout_s)
        self._name = name
        self._block_tokens = block_tokens
        self._numbers = itertools.count(first_number)
        self._mailboxes: dict[int, Mailbox] = {}
        self._links: dict[str, Outbox] = {}
        self._actions: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            Output: self._output,
            Failure: self._failure,
            Ended: self._ended,
            Connect: lambda command: self.dialer.connect(command.instance),
            Disconnect: lambda command: self.dialer.disconnect(command.peer),
        }

    # ------------------------------------------------------------------ Backend

    def start(self, generate: Generate) -> Mailbox:
        number = next(self._numbers)
        token_ids = tokens_to_bytes(generate.token_ids)
        root = root_key(self.model.fingerprint, salt=generate.salt, scope=generate.share_scope)
        spec = RequestSpec(
            number=number,
            num_tokens=len(generate.token_ids),
            token_ids=token_ids,
            root_key=root,
            block_keys=block_keys(root, token_ids, self._block_tokens),
            sampling=generate.sampling,
            max_tokens=generate.max_tokens,
            client_max_tokens=generate.max_tokens,
            tenant=generate.tenant,
            weight=generate.weight,
            priority=generate.priority,
            slo=generate.slo,
            timeout_ns=int(generate.timeout_s * NANOS_PER_S),
            num_choices=generate.n,
        )

        def cancel(choice: int | None) -> None:
            self.driver.handle(Cancel(number, choice))

        mailbox = self._mailboxes[number] = Mailbox(cancel, generate.n)
        self.outcomes.started(number, generate.request_id, spec.num_tokens, spec.slo, generate.traceparent)
        self.driver.handle(Start(spec))
        return mailbox

    def status(self) -> BackendStatus:
        dispatcher = self.driver.core
        assert isinstance(dispatcher, Dispatcher)
        ready: dict[str, int] = {}
        for info in dispatcher.members:
            if info.state is InstanceState.READY and info.name in self._links:
                ready[info.role] = ready.get(info.role, 0) + 1
        if Role.COLOCATED in ready or (Role.PREFILL in ready and Role.DECODE in ready):
            return BackendStatus(True, instances=ready)
        missing = [role for role in (Role.PREFILL, Role.DECODE) if role not in ready]
        return BackendStatus(False, f"no {' and no '.join(missing)} instance is ready", ready)

    # ------------------------------------------------------------------ links

    def opened(self, peer: str, link: Outbox) -> None:
        self._links[peer] = link
        self.driver.handle(PeerOpened(peer))

    def closed(self, peer: str, link: Outbox) -> None:
        """A link that was replaced by a newer one to the same peer is nobody's loss."""
        if self._links.get(peer) is link:
            del self._links[peer]
            self.driver.handle(PeerGone(peer))

    def received(self, peer: str, messages: list[AnyMessage]) -> None:
        for message in messages:
            if isinstance(message, ANSWERS):
                self.inquiries.answered(message)
            else:
                self.driver.handle(Received(peer, message))

    # ------------------------------------------------------------------ commands

    def perform(self, command: Any) -> None:
        self._actions[type(command)](command)

    def _send(self, command: Send) -> None:
        link = self._links.get(command.to)
        if link is not None:
            link.send(command.message)

    def _tell_conductor(self, message: AnyMessage) -> bool:
        link = self._links.get(CONDUCTOR)
        if link is not None:
            link.send(message)
        return link is not None

    def _output(self, command: Output) -> None:
        self.outcomes.output(command, monotonic())
        mailbox = self._mailboxes.get(command.number)
        if mailbox is not None:
            mailbox.route = command.route or mailbox.route
            key = AttemptKey(self._name, command.number, command.choice)
            mailbox.put(TokenOutput(key, 0, command.token_ids, command.finish, command.logprobs, command.cached_tokens))

    def _failure(self, command: Failure) -> None:
        self.outcomes.failed(command)
        mailbox = self._mailboxes.get(command.number)
        if mailbox is not None:
            mailbox.fail(_error(command))

    def _ended(self, command: Ended) -> None:
        self._mailboxes.pop(command.number, None)
        self.outcomes.ended(command, monotonic())


def _error(failure: Failure) -> BackendError:
    match failure.reason:
        case "overloaded":
            return Overloaded(failure.retry_after_ns / NANOS_PER_S, failure.detail)
        case "too_long":
            return PromptTooLong(failure.detail)
        case "grammar":
            return GrammarLost(failure.detail)
        case "unavailable":
            return Unavailable(failure.detail)
        case _:
            return Failed(f"{failure.reason}: {failure.detail}")
