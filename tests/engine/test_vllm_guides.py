"""Grammars in vLLM's scheduler: the masks are those of the torch engine, from wherever the request goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mooncake.engine.grammar import Grammars, choice_grammar, regex_grammar
from mooncake.engine.vllm.guides import Guide, Guides
from tests.tiny_tokenizer import byte_level

LIBRARY = byte_level()
END: int = LIBRARY.token_to_id("<|im_end|>")
NUM_TOKENS = LIBRARY.get_vocab_size() + 5
"""Columns of the logits."""
NUM_WORDS = NUM_TOKENS // 32 + 3
"""Of a row of the mask: vLLM's may be wider."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    LIBRARY.save(str(found / "tokenizer.json"))
    (found / "config.json").write_text(f'{{"eos_token_id": {END}}}')
    return found


@pytest.fixture
def guides(folder: Path) -> Iterator[Guides]:
    found = Guides(folder, NUM_TOKENS)
    yield found
    found.close()


def encode(text: str) -> list[int]:
    return [LIBRARY.token_to_id(char) for char in text]


def made(guides: Guides, request: str, grammar: str, generated: str = "") -> Guide:
    """As vLLM's scheduler gets it: by asking again."""
    deadline = time.monotonic() + 10
    while (guide := guides.take(request, grammar, encode(generated))) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return guide


def allowed(guide: Guide) -> set[int]:
    mask = torch.full((3, NUM_WORDS), 7, dtype=torch.int32)
    guide.fill_bitmask(mask, 1)
    assert (mask[0] == 7).all() and (mask[2] == 7).all()
    return set(np.flatnonzero(np.unpackbits(mask[1].numpy().view(np.uint8), bitorder="little")).tolist())


def texts(tokens: set[int]) -> set[str]:
    return {LIBRARY.id_to_token(token) for token in tokens}


def test_a_request_that_goes_on_elsewhere_goes_on_in_its_grammar(guides: Guides) -> None:
    grammar = choice_grammar(["yes", "yellow", "no"])
    assert {text[0] for text in texts(allowed(made(guides, "new", grammar)))} == {"y", "n"}
    guide = made(guides, "old", grammar, "ye")
    assert {text[0] for text in texts(allowed(guide))} == {"s", "l"}
    assert guide.validate_tokens(encode("llx")) == encode("ll")
    assert guide.accept_tokens("old", encode("s"))
    assert allowed(guide) == {END} and not guide.is_terminated()
    guide.rollback(1)
    assert {text[0] for text in texts(allowed(guide))} == {"s", "l"}
    assert guide.accept_tokens("old", encode("s")) and guide.accept_tokens("old", [END]) and not guide.fault


def test_masks_are_those_of_the_torch_engine(folder: Path, guides: Guides) -> None:
    grammar = regex_grammar(r"[a-f]{2,4}[0-9]")
    matcher = Grammars.load(folder, NUM_TOKENS).matcher(grammar)
    guide = made(guides, "a", grammar)
    for token in encode("abc7"):
        logits = np.zeros(NUM_TOKENS, dtype=np.float32)
        matcher.forbid(logits)
        assert set(np.flatnonzero(np.isfinite(logits)).tolist()) == allowed(guide)
        matcher.advance(token)
        assert guide.accept_tokens("a", [token])


@pytest.mark.parametrize(
    ("grammar", "generated"), [("start: /[/", ""), ("start: nothing", ""), (choice_grammar(["yes"]), "no")]
)
def test_what_cannot_be_followed_ends_with_the_next_token_and_says_why(
    guides: Guides, grammar: str, generated: str
) -> None:
    guide = made(guides, "a", grammar, generated)
    assert guide.fault
    assert len(allowed(guide)) == 32 * NUM_WORDS, "a row without a token would have no largest logit"
    assert not guide.accept_tokens("a", encode("y"))
    assert guide.validate_tokens(encode("y")) == []


def test_a_token_that_is_not_allowed_ends_it(guides: Guides) -> None:
    guide = made(guides, "a", choice_grammar(["yes"]))
    assert not guide.accept_tokens("a", encode("n"))
    assert guide.fault


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    guides = Guides(tmp_path, NUM_TOKENS)
    guide = made(guides, "a", choice_grammar(["yes"]))
    assert "has no tokenizer.json" in guide.fault and not guide.accept_tokens("a", encode("y"))
    assert "has no tokenizer.json" in made(guides, "b", choice_grammar(["no"])).fault
    guides.close()


def test_a_request_that_ended_early_leaves_nothing(guides: Guides) -> None:
    assert guides.take("a", choice_grammar(["yes"]), []) is None
    guides.forget("a")
    made(guides, "b", choice_grammar(["no"]))
    assert not guides._made
    guide = made(guides, "a", choice_grammar(["no"]))
    assert {text[0] for text in texts(allowed(guide))} == {"n"}
