"""What a grammar costs each guided token, over the default model's vocabulary: the mask with its use, and the step forward;
then compiling, and building the state of a continuation again. `python benchmarks/grammar.py`"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from common import MODEL, emit, finish, percentile

from mooncake.engine.grammar import Grammars, json_grammar, regex_grammar
from mooncake.engine.models import resolve_model
from mooncake.frontend.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 20},
        "address": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"street": {"type": "string"}}}]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
FIELDS = {f"field{at}": {"type": "number"} for at in range(200)}
WIDE = {"type": "object", "properties": FIELDS, "required": list(FIELDS)}
GRAMMARS = {
    "person": json_grammar(PERSON, strict=True),
    "any_values": json_grammar({"type": "array", "minItems": 200}, strict=True),
    "wide": json_grammar(WIDE, strict=True),
    "regex": regex_grammar(r"([a-z]{1,20}@[a-z]{1,20}\.(com|org)\n){40}"),
}
NUM_TOKENS = 300


def timed(call: Callable[..., object], *args: object) -> float:
    """Microseconds."""
    began = time.perf_counter()
    call(*args)
    return 1e6 * (time.perf_counter() - began)


def walk(grammars: Grammars, grammar: str, ends: tuple[int, ...], seed: int) -> tuple[list[float], list[int]]:
    """Microseconds of each token, and the tokens: drawn evenly of those that are allowed, the end last of all."""
    rng = np.random.default_rng(seed)
    matcher, times, tokens = grammars.matcher(grammar), [], []
    for _ in range(NUM_TOKENS):
        logits = rng.standard_normal(grammars.num_tokens).astype(np.float32)
        logits[list(ends)] = -1e6
        took = timed(matcher.forbid, logits)
        token = int(np.argmax(logits))
        if token in ends:
            break
        times.append(took + timed(matcher.advance, token))
        tokens.append(token)
    return times, tokens


def main() -> None:
    folder = resolve_model(MODEL).path
    ends = Tokenizer.load(folder).eos_ids
    figures: dict[str, float] = {"load_ms": timed(Grammars.load, folder) / 1e3}
    grammars = Grammars.load(folder)
    for name, grammar in GRAMMARS.items():
        compile_ms = timed(grammars.matcher, grammar) / 1e3
        times, tokens = walk(grammars, grammar, ends, 1)
        again = grammars.matcher(grammar)
        rebuild = sum(timed(again.advance, token) for token in tokens) / len(tokens)
        emit(
            grammar=name,
            num_tokens=len(tokens),
            compile_ms=round(compile_ms, 2),
            us_p50=round(percentile(times, 0.5), 1),
            us_p99=round(percentile(times, 0.99), 1),
            us_mean=round(sum(times) / len(times), 1),
            rebuild_us_per_token=round(rebuild, 1),
        )
        figures |= {f"us_per_token_{name}": sum(times) / len(times), f"compile_ms_{name}": compile_ms}
    finish("grammar", figures)


main()
