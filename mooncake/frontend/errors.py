"""What a client is told when something is wrong, in OpenAI's shape, with the HTTP status."""

from __future__ import annotations

import math

import msgspec

from mooncake.frontend.backend import BackendError, Failed, GrammarLost, Overloaded, PromptTooLong, Unavailable


class ApiError(Exception):
    """param: the field or header at fault. kind: OpenAI's `type`. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s)))]


def bad_field(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def too_long(param: str, num_prompt: str, max_tokens: int, max_context: int) -> ApiError:
    """litellm knows this error by the words before the number, langchain by its last ones."""
    message = (
        f"this model's maximum context length is {max_context} tokens, but the request asks for {num_prompt} tokens of prompt "
        f"and at least {max_tokens} of output: the prompt is too long for that"
    )
    return bad_field(param, message, "context_length_exceeded")


def from_backend(error: BackendError, prompt_field: str | None = None, form_field: str | None = None) -> ApiError:
    """The HTTP answer to each error of the backend. prompt_field, form_field: what the request calls its prompt, and what asked
    for the form of the output."""
    match error:
        case Overloaded():
            return ApiError(
                429, str(error), kind="rate_limit_error", code=error.reason, retry_after_s=error.retry_after_s
            )
        case PromptTooLong():
            return ApiError(400, str(error), param=prompt_field, code="context_length_exceeded")
        case GrammarLost():
            message = f"the output cannot follow what was asked for: {error}"
            return ApiError(400, message, param=form_field, code="grammar_lost")
        case Unavailable():
            return ApiError(503, str(error), kind="server_error", code="unavailable", retry_after_s=1.0)
        case Failed():
            return ApiError(500, str(error), kind="server_error", code="failed")
        case _:
            raise TypeError(f"no HTTP answer is defined for {type(error).__name__}")
