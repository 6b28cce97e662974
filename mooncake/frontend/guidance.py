"""Grammars of requests, checked before anything starts: a worker thread compiles them as the engines will."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mooncake.engine.grammar import Grammars
from mooncake.frontend.errors import ApiError, bad_field
from mooncake.frontend.schema import Request
from mooncake.frontend.structured import Form

MAX_WAITING = 64
"""Grammars in the thread or waiting for it; requests with more are told to come back."""


MAX_FAULT_CHARS = 300


class Guidance:
    """grammars: None where the engines follow none."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._num_waiting = 0

    async def check(self, request: Request, form: Form) -> None:
        """Raises ApiError naming the field."""
        if self._grammars is None:
            raise bad_field(
                form.field, "is not supported: this server's engine follows no grammar", "unsupported_parameter"
            )
        for name in ("min_tokens", "ignore_eos"):
            if getattr(request, name):
                raise bad_field(name, f"cannot be combined with {form.field}, which says where the output ends")
        if self._num_waiting >= MAX_WAITING:
            message = "too many grammars are being compiled"
            raise ApiError(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, _check, self._grammars, form)
        finally:
            self._num_waiting -= 1


def _check(grammars: Grammars, form: Form) -> None:
    """Names the source that is wrong by itself, where there is one."""
    fault = grammars.matcher(form.grammar).fault
    if not fault:
        return
    for field, grammar in form.sources:
        own = grammars.matcher(grammar).fault
        if own:
            raise _cannot_follow(field, own)
    raise _cannot_follow(form.field, fault)


def _cannot_follow(field: str, fault: str) -> ApiError:
    """The library repeats what it does not understand."""
    shown = fault if len(fault) <= MAX_FAULT_CHARS else f"{fault[:MAX_FAULT_CHARS]}..."
    return bad_field(field, f"cannot be followed: {shown}", "invalid_value")
