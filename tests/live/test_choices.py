"""n > 1 live: each choice of a seeded request has one text, whatever runs beside it and wherever it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.harness import Client, Cluster
from tests.live.models import Reference, save_tiny_model
from tests.live.test_exact import FLOAT32, ask, ask_and_kill, prompt

NUM_TOKENS = 100
SEEDED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 77}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    options = ("--prefill", "1", "--decode", "2", "--store-memory", "128MiB")
    with Cluster("--model", str(model), *FLOAT32, *options) as found:
        yield found


def test_a_choice_has_the_same_text_in_any_company_and_after_a_kill(cluster: Cluster) -> None:
    calls = [(prompt(at, 70 + 60 * at), NUM_TOKENS) for at in range(3)]
    alone = [ask(cluster, call, n=3, **SEEDED)[0] for call in calls]
    for found in alone:
        assert (found.error, len(set(found.texts.values()))) == ("", 3)
        assert found.num_output == 3 * NUM_TOKENS
    [single] = ask(cluster, calls[0], **SEEDED)
    assert single.text == alone[0].text, "choice 0 is what a request of one choice gets"
    [five] = ask(cluster, calls[0], n=5, **SEEDED)
    assert {choice: five.texts[choice] for choice in range(3)} == alone[0].texts
    assert [found.texts for found in ask(cluster, *calls, n=3, **SEEDED)] == [found.texts for found in alone]
    after_kill = ask_and_kill(cluster, 2, *calls, n=3, **SEEDED)
    assert [(found.error, found.texts) for found in after_kill] == [("", found.texts) for found in alone]


def test_greedy_choices_are_equal(cluster: Cluster, model: Path) -> None:
    tokens = prompt(9, 50)
    [found] = ask(cluster, (tokens, 20), n=2)
    assert found.texts == dict.fromkeys(range(2), Reference(model).text(tokens, 20))


def test_the_prompt_is_computed_once_and_counted_once(model: Path) -> None:
    tokens, num_choices = prompt(5, 330), 4
    with Cluster("--model", str(model), *FLOAT32, "--store-memory", "64MiB") as cluster:

        async def scenario() -> Any:
            async with Client(cluster) as client:
                body = {"model": client.model, "prompt": list(tokens), "max_tokens": 8, "n": num_choices}
                return (await client.post("/v1/completions", body | {"ignore_eos": True})).json()

        answer = asyncio.run(scenario())
        assert [(choice["index"], choice["finish_reason"]) for choice in answer["choices"]] == [
            (index, "length") for index in range(num_choices)
        ]
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), 8 * num_choices)
        cluster.stop()
        found = cluster.replay_all()
        prefill, decode = found["prefill-0"].load, found["decode-0"].load
        assert prefill is not None and prefill.num_computed_tokens == len(tokens)
        partial = len(tokens) % 32
        assert decode is not None and decode.num_loaded_tokens == len(tokens) + (num_choices - 1) * partial
        assert [each.num_attempts for each in found["frontend-0"].ended] == [1]
