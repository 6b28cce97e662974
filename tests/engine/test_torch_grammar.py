"""Outputs of random weights under grammars: always what was asked for, wherever and beside whomever they are computed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake.core.types import AttemptKey, Job, SamplingParams
from mooncake.engine.core import Drawn, SequenceFailed, SequenceReleased
from mooncake.engine.grammar import choice_grammar, json_grammar, regex_grammar
from mooncake.engine.torch.step_engine import TorchStepEngine
from tests.engine.tiny_models import GROUPED, LIMITS, Run, prompts, save_model, tiny_engine
from tests.tiny_tokenizer import byte_level

LIBRARY = byte_level()
END: int = LIBRARY.token_to_id("<|im_end|>")
MAX_TOKENS = 150
NAME_CHARS, MAX_TAGS = 8, 3
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": NAME_CHARS},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "<think>", "<|im_start|>"]}, "maxItems": MAX_TAGS},
        "where": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "where"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
                        "additionalProperties": False}},
}  # fmt: skip
JSON = json_grammar(SCHEMA, strict=True)
LIMITS_HERE = msgspec.structs.replace(LIMITS, num_pages=256, max_context=400, max_batch=12)
GREEDY = SamplingParams(temperature=0.0, stop_token_ids=(END,))
FREE = SamplingParams(seed=3, temperature=1.2, stop_token_ids=(END,))


def guided(seed: int, grammar: str = JSON, **words: Any) -> SamplingParams:
    return SamplingParams(seed=seed, stop_token_ids=(END,), grammar=grammar, **words)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logits have more columns than the tokenizer has tokens, as those of real models often do."""
    words = {**GROUPED, "vocab_size": LIBRARY.get_vocab_size() + 21, "eos_token_id": END}
    folder = save_model(("llama", words), tmp_path_factory.mktemp("llama"))
    LIBRARY.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def engine(path: Path) -> TorchStepEngine:
    return tiny_engine(path, LIMITS_HERE)


def text_of(tokens: list[int]) -> str:
    assert tokens[-1] == END, "the output did not end by itself"
    return str(LIBRARY.decode(tokens[:-1], skip_special_tokens=False))


def check(found: Any) -> None:
    """That it is what SCHEMA says."""
    assert list(found) == ["name", "age", "tags", "where"]
    assert isinstance(found["name"], str) and len(found["name"]) <= NAME_CHARS
    assert isinstance(found["age"], int) and 0 <= found["age"] <= 150
    assert len(found["tags"]) <= MAX_TAGS and set(found["tags"]) <= {"a", "<think>", "<|im_start|>"}
    assert found["where"] is None or list(map(type, found["where"].values())) == [bool]


def run_all(engine: TorchStepEngine, *sampling: SamplingParams) -> list[list[int]]:
    run = Run(engine)
    for prompt, params in zip(prompts(*range(10, 10 + len(sampling))), sampling, strict=True):
        run.submit(prompt, MAX_TOKENS, params)
    return run.finish()


def test_random_weights_write_what_the_schema_says(engine: TorchStepEngine) -> None:
    sampling = [guided(seed, temperature=1.5) for seed in range(8)]
    sampling += [guided(0, temperature=0.0), guided(1, top_p=0.5, presence_penalty=2.0, num_logprobs=2)]
    texts = [text_of(tokens) for tokens in run_all(engine, *sampling)]
    for text in texts:
        check(json.loads(text))
    assert len(set(texts)) > 5


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (choice_grammar(["yes", "no", 'a "b"/\\\n', "né"]), r'yes|no|a "b"/\\\n|né'),
        (regex_grammar(r"[0-9]{3}/[a-f]{1,4}"), r"[0-9]{3}/[a-f]{1,4}"),
        ('start: "x" y{2,3}\ny: /[01]/', r"x[01]{2,3}"),
    ],
)
def test_other_grammars(engine: TorchStepEngine, grammar: str, pattern: str) -> None:
    found = {text_of(tokens) for tokens in run_all(engine, *[guided(seed, grammar) for seed in range(6)])}
    assert all(re.fullmatch(pattern, text) for text in found), found
    assert len(found) > 1


def test_others_of_the_batch_are_as_they_were(engine: TorchStepEngine) -> None:
    alone = run_all(engine, FREE, GREEDY, FREE)
    mixed = run_all(engine, FREE, GREEDY, FREE, guided(5), guided(6, temperature=0.0))
    assert mixed[:3] == alone
    for tokens in mixed[3:]:
        check(json.loads(text_of(tokens)))


@pytest.mark.parametrize("params", [guided(11), guided(0, temperature=0.0)])
def test_a_continuation_elsewhere_is_the_rest_of_the_output(
    path: Path, engine: TorchStepEngine, params: SamplingParams
) -> None:
    prompt = prompts(20)[0]
    run = Run(engine)
    run.submit(prompt, MAX_TOKENS, params)
    [whole] = run.finish()
    elsewhere = Run(tiny_engine(path, LIMITS_HERE))
    for cut in range(1, min(len(whole), LIMITS_HERE.max_batch)):
        elsewhere.submit([*prompt, *whole[:cut]], MAX_TOKENS, params, num_prompt=len(prompt))
    assert elsewhere.finish() == [whole[cut:] for cut in range(1, min(len(whole), LIMITS_HERE.max_batch))]


def test_choices_begin_together_and_each_follows_the_grammar(engine: TorchStepEngine) -> None:
    """The prefill instance draws all first tokens from the same logits; each choice goes on by itself."""
    grammar, num_choices, prompt = choice_grammar(["abc", "bca", "cab", "dog"]), 6, prompts(18)[0]
    params = guided(2, grammar, temperature=2.0)
    run = Run(engine)
    run.outputs[0], run.logprobs[0] = [], []
    engine.add_sequence(0, prompt, len(prompt), params, 0, num_choices)
    job = Job(AttemptKey("t", 0), len(prompt), len(prompt), MAX_TOKENS, (), b"", params, num_choices=num_choices)
    run.core.submit(0, job, one_token=True)
    [firsts] = run.finish()
    assert len(firsts) == num_choices and len(set(firsts)) > 1
    texts = []
    for choice, first in enumerate(firsts):
        one = Run(engine)
        one.outputs[0], one.logprobs[0] = [], []
        engine.add_sequence(0, [*prompt, first], len(prompt), params, choice)
        key = AttemptKey("t", 0, choice)
        one.core.submit(0, Job(key, len(prompt) + 1, len(prompt), MAX_TOKENS, (), b"", params))
        texts.append(text_of([first, *one.finish()[0]]))
    assert set(texts) <= {"abc", "bca", "cab", "dog"} and len(set(texts)) > 1


def test_too_few_tokens_cut_the_output(engine: TorchStepEngine) -> None:
    run = Run(engine)
    run.submit(prompts(10)[0], 5, guided(1))
    [tokens] = run.finish()
    assert len(tokens) == 5 and END not in tokens


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: nothing", "unknown name"),
        (json_grammar({"type": "objct"}, strict=True), "Invalid type: objct"),
        (json_grammar({"type": "string", "pattern": "^(a{1000}){1000}$"}, strict=True), "too many expressions"),
        (json_grammar({"type": "integer", "multipleOf": 1000003}, strict=True), "multipleOf 1000003"),
        ('start: "x" s{400}\ns: "a" | "a" s', "Too many items"),
        ("start: /" + "a" * 200_000 + "/", "bytes"),
    ],
)
def test_a_grammar_that_cannot_be_followed_ends_its_sequence_only(
    engine: TorchStepEngine, grammar: str, reason: str
) -> None:
    alone = run_all(engine, FREE)[0]
    run = Run(engine)
    run.submit(prompts(10)[0], MAX_TOKENS, FREE)
    run.submit(prompts(11)[0], MAX_TOKENS, guided(4, grammar, temperature=2.0))
    failures = []
    while not run.core.idle:
        plan = run.core.schedule()
        assert plan is not None
        run.core.update(plan, engine.run(plan, None, {}))
        for output in run.core.take_outputs():
            if isinstance(output, Drawn):
                run.outputs[output.seq].extend(output.token_ids)
            elif isinstance(output, SequenceFailed):
                failures.append(output)
            elif isinstance(output, SequenceReleased):
                engine.remove_sequence(output.seq)
    [failure] = failures
    assert (failure.seq, failure.reason) == (1, "grammar")
    assert reason in failure.detail, failure.detail
    assert run.outputs[0] == alone


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    engine = tiny_engine(save_model(("llama", GROUPED), tmp_path))
    run = Run(engine)
    run.submit(prompts(10)[0], 5, guided(1))
    plan = run.core.schedule()
    assert plan is not None
    assert engine.run(plan, None, {}).lost == ((0, "the model folder has no tokenizer, which a grammar needs"),)
