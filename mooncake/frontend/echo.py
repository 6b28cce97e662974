"""A backend without a cluster: it answers with the prompt's own tokens. For tests and to measure the HTTP path alone.

One task gives every running choice one token a step, as an instance's StepTokens do. A choice ends with the first of its
stop_token_ids once the prompt is said; with none (ignore_eos) it says the prompt again until max_tokens. Choice c leaves the
prompt's first c tokens out.
"""

from __future__ import annotations

import asyncio
import itertools

from mooncake.core.messages import TokenOutput
from mooncake.core.types import AttemptKey, FinishReason, TokenLogprobs
from mooncake.frontend.backend import BackendError, BackendStatus, Generate, ModelInfo
from mooncake.frontend.mailbox import Mailbox
from mooncake.scheduler.dispatcher import Route


class _Speaker:
    """One choice of a request: the tokens it still has to say."""

    def __init__(self, key: AttemptKey, generate: Generate, cached_tokens: int) -> None:
        self.key = key
        self.generate = generate
        self.cached_tokens = cached_tokens
        self.num_said = 0
        self.words = generate.token_ids[key.choice :] or generate.token_ids

    def say(self) -> TokenOutput:
        words, sampling = self.words, self.generate.sampling
        at_end = self.num_said >= len(words) and bool(sampling.stop_token_ids)
        token = sampling.stop_token_ids[0] if at_end else words[self.num_said % len(words)]
        self.num_said += 1
        finish = None
        if token in sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif self.num_said == self.generate.max_tokens:
            finish = FinishReason.LENGTH
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.num_logprobs is not None:
            top = tuple((token + rank, -0.5 - rank) for rank in range(sampling.num_logprobs))
            logprobs = (TokenLogprobs(-0.5, top),)
        cached = self.cached_tokens if self.num_said == 1 and self.key.choice == 0 else None
        position = len(self.generate.token_ids) + self.num_said - 1
        return TokenOutput(self.key, position, (token,), finish, logprobs, cached)


class EchoBackend:
    """route: said to be that of every request. refusal: given to every new request. failure: (number of tokens, error), given
    in place of later tokens."""

    def __init__(self, model: ModelInfo, *, step_s: float = 0.0, cached_tokens: int = 0) -> None:
        self.model = model
        self.step_s = step_s
        self.cached_tokens = cached_tokens
        self.route: Route | None = None
        self.refusal: BackendError | None = None
        self.failure: tuple[int, BackendError] | None = None
        self.ready = True
        self.started: list[Generate] = []
        self.num_cancelled = 0
        self._numbers = itertools.count()
        self._running: dict[AttemptKey, tuple[_Speaker, Mailbox]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        """Choices."""
        return len(self._running)

    def start(self, generate: Generate) -> Mailbox:
        if self.refusal is not None:
            raise self.refusal
        self.started.append(generate)
        number = next(self._numbers)
        mailbox = Mailbox(lambda choice: self._cancel(number, choice), generate.n)
        mailbox.route = self.route
        for choice in range(generate.n):
            key = AttemptKey("echo", number, choice)
            self._running[key] = (_Speaker(key, generate, self.cached_tokens), mailbox)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._speak())
        return mailbox

    def status(self) -> BackendStatus:
        if self.ready:
            return BackendStatus(True, instances={"echo": 1})
        return BackendStatus(False, "the echo is told to be silent")

    def _cancel(self, number: int, choice: int | None) -> None:
        self.num_cancelled += 1
        for key in [key for key in self._running if key.request == number and choice in (None, key.choice)]:
            del self._running[key]

    async def _speak(self) -> None:
        while self._running:
            await asyncio.sleep(self.step_s)
            for key, (speaker, mailbox) in list(self._running.items()):
                if key not in self._running:  # cancelled just now
                    continue
                if self.failure is not None and speaker.num_said >= self.failure[0]:
                    mailbox.fail(self.failure[1])
                    del self._running[key]
                    continue
                output = speaker.say()
                mailbox.put(output)
                if output.finish is not None:
                    del self._running[key]
