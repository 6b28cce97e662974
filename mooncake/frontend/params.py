"""From a parsed request, its headers and the model's limits to what the backend runs."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import msgspec

from mooncake.core.types import NANOS_PER_MS, SamplingParams, Slo
from mooncake.frontend.backend import Generate, ModelInfo
from mooncake.frontend.errors import ApiError, bad_field, too_long
from mooncake.frontend.schema import MAX_SALT_CHARS, Request

MAX_PRIORITY = 100
_SEED_BITS = 63
_TRACEPARENT_BYTES_MAX = 128
"""More than any version of it needs; what is not one is a trace of its own."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Directives(msgspec.Struct, frozen=True):
    """What the headers say."""

    request_id: str
    slo: Slo = Slo()
    priority: int = 0
    traceparent: str = ""
    salt: str = ""


def read_headers(request_id: str, headers: Mapping[bytes, bytes], default_slo: Slo) -> Directives:
    slo = Slo(
        ttft_ns=_objective(headers, b"x-mooncake-ttft-ms", default_slo.ttft_ns),
        tbt_ns=_objective(headers, b"x-mooncake-tbt-ms", default_slo.tbt_ns),
    )
    traceparent = headers.get(b"traceparent", b"")[:_TRACEPARENT_BYTES_MAX].decode("latin-1")
    return Directives(request_id, slo, _priority(headers), traceparent, _salt(headers))


def _salt(headers: Mapping[bytes, bytes]) -> str:
    """What `cache_salt` is if the body has none, for gateways that do not change bodies."""
    salt = headers.get(b"x-mooncake-salt", b"").decode("latin-1")
    if len(salt) > MAX_SALT_CHARS:
        raise bad_field("x-mooncake-salt", f"must have up to {MAX_SALT_CHARS} characters, got {len(salt)}")
    return salt


def read_request_id(headers: Mapping[bytes, bytes], rng: random.Random) -> str:
    """The client's, or a new one if it gave none that is valid: every answer has one."""
    given = _given_request_id(headers)
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"{rng.getrandbits(128):032x}"


def check_request_id(headers: Mapping[bytes, bytes]) -> None:
    """Raises ApiError."""
    given = _given_request_id(headers)
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise bad_field("x-request-id", "must be 1 to 128 printable ASCII characters without spaces")


def _given_request_id(headers: Mapping[bytes, bytes]) -> str | None:
    value = headers.get(b"x-request-id")
    return None if value is None else value.decode("latin-1")


def _objective(headers: Mapping[bytes, bytes], name: bytes, default: int | None) -> int | None:
    value = headers.get(name)
    if value is None:
        return default
    try:
        ms = 0.0 if b"_" in value else float(value)
    except ValueError:
        ms = 0.0
    if not 0 < ms <= 1e9:
        message = f"must be a positive number of milliseconds, got {value.decode('latin-1')!r:.60}"
        raise bad_field(name.decode(), message)
    return int(ms * NANOS_PER_MS)


def _priority(headers: Mapping[bytes, bytes]) -> int:
    value = headers.get(b"x-mooncake-priority", b"0")
    if re.fullmatch(rb"-?\d{1,3}", value) and abs(int(value)) <= MAX_PRIORITY:
        return int(value)
    message = f"must be an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {value.decode('latin-1')!r:.60}"
    raise bad_field("x-mooncake-priority", message)


def check_model_name(name: str, model: ModelInfo) -> None:
    """Raises ApiError 404."""
    if name != model.name:
        message = f"the model {name[:200]!r} does not exist; this server has {model.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def build_generates(
    request: Request,
    directives: Directives,
    prompts: list[list[int]],
    model: ModelInfo,
    eos_ids: tuple[int, ...],
    timeout_s: float,
    rng: random.Random,
    grammar: str = "",
) -> list[Generate]:
    """One for each prompt, all with the same sampling. Raises ApiError for what does not fit the model."""
    for token in request.stop_token_ids or ():
        if token >= model.vocab_size:
            raise bad_field("stop_token_ids", f"token ids must be from 0 to {model.vocab_size - 1}, got {token}")
    sampling = _sampling(request, eos_ids, model.vocab_size, rng, grammar)
    field = request.prompt_field
    fields = [field] if len(prompts) == 1 else [f"{field}[{at}]" for at in range(len(prompts))]
    return [
        Generate(
            request_id=directives.request_id,
            token_ids=token_ids,
            sampling=sampling,
            max_tokens=_max_tokens(request, name, token_ids, model),
            n=request.num_choices,
            salt=request.cache_salt or directives.salt,
            priority=directives.priority,
            slo=directives.slo,
            timeout_s=timeout_s,
            traceparent=directives.traceparent,
        )
        for name, token_ids in zip(fields, prompts, strict=True)
    ]


def _max_tokens(request: Request, field: str, token_ids: list[int], model: ModelInfo) -> int:
    """field: the prompt's. Raises ApiError."""
    if not token_ids:
        raise bad_field(field, "must not be empty")
    if min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
        wrong = next(token for token in token_ids if not 0 <= token < model.vocab_size)
        raise bad_field(field, f"token ids must be from 0 to {model.vocab_size - 1}, got {wrong}")
    room = model.max_context - len(token_ids)
    max_tokens = room if request.max_output is None else request.max_output
    if room < 1 or max_tokens > room:
        raise too_long(field, str(len(token_ids)), max(1, max_tokens), model.max_context)
    if (request.min_tokens or 0) > max_tokens:
        raise bad_field("min_tokens", f"must not exceed the output limit of {max_tokens}, got {request.min_tokens}")
    return max_tokens


def _sampling(
    request: Request, eos_ids: tuple[int, ...], vocab_size: int, rng: random.Random, grammar: str
) -> SamplingParams:
    own_stops = tuple(request.stop_token_ids or ())
    seed = rng.getrandbits(_SEED_BITS) if request.seed is None else request.seed % 2**_SEED_BITS
    return SamplingParams(
        seed=seed,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        stop_token_ids=own_stops if request.ignore_eos else tuple(dict.fromkeys(own_stops + eos_ids)),
        min_tokens=request.min_tokens or 0,
        num_logprobs=request.num_logprobs,
        grammar=grammar,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in bias.items():
        if not re.fullmatch(r"[0-9]{1,10}", key) or int(key) >= vocab_size:
            raise bad_field("logit_bias", f"keys must be token ids from 0 to {vocab_size - 1}, got {key[:60]!r}")
        pairs.append((int(key), value))
    return tuple(sorted(pairs))
