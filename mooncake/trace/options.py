"""What a synthetic trace is to be like: declared once, for the command line as well."""

from __future__ import annotations

import contextlib
from typing import Annotated

import msgspec
from msgspec import Meta

from mooncake.core.errors import ConfigError
from mooncake.trace.types import TOKENS_MAX

DEFAULT_REQUESTS, DEFAULT_RATE, DEFAULT_INPUT, DEFAULT_OUTPUT = 10_000, 1.0, 4096, 256
"""Without a source."""

FACTORS = {"k": 1_000, "M": 1_000_000, "G": 1_000_000_000}

_Tokens = Annotated[float, Meta(ge=1, le=TOKENS_MAX)]
_Spread = Annotated[float, Meta(ge=0, le=20)]


class SynthOptions(msgspec.Struct, frozen=True, kw_only=True):
    """None: as in the source; without one, as the texts say."""

    requests: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    rate: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    cv: _Spread | None = None
    step_s: Annotated[float, Meta(ge=0.001, le=3600)] | None = None
    input_mean: _Tokens | None = None
    input_cv: _Spread | None = None
    output_mean: _Tokens | None = None
    output_cv: _Spread | None = None
    hit_rate: Annotated[float, Meta(ge=0, le=0.99)] | None = None
    reuse_lag: Annotated[float, Meta(ge=1, le=1e6)] = 100.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0


TEXTS = {
    "requests": f"how many; otherwise as many as the source has, or {DEFAULT_REQUESTS}",
    "rate": f"requests per second; otherwise the source's, or {DEFAULT_RATE:g}",
    "cv": "deviation over mean of the gaps, drawn from a gamma distribution; otherwise the source's gaps, or 1 (Poisson)",
    "step_s": "step of a coarse clock in seconds; otherwise the source's, or a millisecond",
    "input_mean": f"tokens, drawn log-normally; otherwise the source's lengths, or {DEFAULT_INPUT}",
    "input_cv": "their deviation over mean; 1 without a source",
    "output_mean": f"tokens, drawn log-normally; otherwise the source's lengths, or {DEFAULT_OUTPUT}",
    "output_cv": "their deviation over mean; 1 without a source",
    "hit_rate": "by token, of a cache that never evicts; otherwise prefixes are shared as in the source, or not at all",
    "reuse_lag": "with a hit rate: mean number of requests from a prompt to its reuse; 100",
    "seed": "of all draws; 0",
}


def parse_synth_options(given: dict[str, str]) -> SynthOptions:
    """From text by name. Raises ConfigError."""
    values = {name: number_of(text) for name, text in given.items()}
    for name, value in values.items():
        try:
            msgspec.convert({name: value}, SynthOptions, strict=False)
        except msgspec.ValidationError as error:
            reason = str(error).partition(" - at ")[0].replace(" | null", "")
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{name} = {given[name]!r} ({flag}): {reason[:1].lower()}{reason[1:]}") from None
    return msgspec.convert(values, SynthOptions, strict=False)


def number_of(text: str) -> float | str:
    """As Python reads it, which takes .5 and 1_000 too, or with k, M or G at its end; text that is none stays."""
    factor = FACTORS.get(text[-1:], 1)
    digits = text[:-1] if factor > 1 else text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(digits) * factor
    return text
