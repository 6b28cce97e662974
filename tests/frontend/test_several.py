"""Several prompts in one request, echo, best_of, and stop strings that are kept."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mooncake.core.messages import TokenOutput
from mooncake.core.types import AttemptKey, FinishReason, TokenLogprobs
from mooncake.frontend.assembly import Delta
from mooncake.frontend.backend import Failed
from mooncake.frontend.best_of import best
from mooncake.frontend.mailbox import Mailbox
from mooncake.frontend.several import Several
from mooncake.frontend.stops import StopScanner
from mooncake.frontend.tokenizer import Tokenizer

from .harness import events, run, site, until

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def texts(answer: Any) -> list[str]:
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def test_each_prompt_has_its_choices_one_after_the_other(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.cached_tokens = 1
            ids = tokenizer.encode("quick brown", add_special_tokens=True)
            whole = (await s.complete(["hello", "world"])).json()
            assert texts(whole) == ["hello", "world"]
            assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
            num_prompt = sum(len(generate.token_ids) for generate in s.backend.started)
            assert whole["usage"]["prompt_tokens"] == num_prompt
            mixed = (await s.complete([ids, [*ids, *ids]], n=2)).json()
            assert texts(mixed)[0] == "quick brown" and texts(mixed)[2] == "quick brownquick brown"
            assert [generate.n for generate in s.backend.started[-2:]] == [2, 2]
            streamed = await s.complete(["hello", "lazy dog"], stream=True, stream_options={"include_usage": True})
            found = {0: "", 1: ""}
            for event in events(streamed):
                for choice in event["choices"]:
                    found[choice["index"]] += choice["text"]
            assert found == {0: "hello", 1: "lazy dog"}
            assert s.backend.num_running == 0

    run(test)


def test_who_leaves_leaves_all_prompts(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer, step_s=0.01) as s:
            body = {"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 1000, "ignore_eos": True, "stream": True}
            reader, writer = await s.open("/v1/completions", body)
            await reader.read(200)
            assert s.backend.num_running == 3
            writer.transport.abort()
            await until(lambda: s.backend.num_running == 0)

    run(test)


def test_if_one_prompt_fails_all_do(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.failure = (2, Failed("broken"))
            answer = await s.complete(["hello, world", "b"], max_tokens=50, ignore_eos=True)
            assert (answer.status_code, answer.json()["error"]["message"]) == (500, "broken")
            await until(lambda: s.backend.num_running == 0)

    run(test)


def test_outputs_are_numbered_through_and_an_end_is_asked_no_more() -> None:
    async def test() -> None:
        cancelled: list[tuple[int, int | None]] = []

        def made(at: int) -> Mailbox:
            return Mailbox(lambda choice: cancelled.append((at, choice)), 2)

        boxes = [made(0), made(1)]
        several = Several(boxes, 2)

        def put(at: int, choice: int, finish: FinishReason | None = None) -> None:
            boxes[at].put(TokenOutput(AttemptKey("f", at, choice), 0, (at * 10 + choice,), finish))

        put(1, 0)
        [output] = await several.next()
        assert (output.key.choice, output.token_ids) == (2, (10,))
        put(0, 1, STOP)
        put(1, 1, STOP)
        assert sorted(output.key.choice for output in await several.next()) in ([1, 3], [1], [3])
        several.cancel(2)
        assert cancelled == [(1, 0)]
        put(0, 0, LENGTH)
        rest = await several.next()
        while not any(output.key.choice == 0 for output in rest):
            rest = await several.next()
        assert await several.next() == []
        several.cancel()
        assert cancelled == [(1, 0)], "nothing was left to cancel"
        await asyncio.sleep(0)

    run(test)


def test_echo_is_the_prompt_before_each_output(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            assert texts((await s.complete("hello", echo=True)).json()) == ["hellohello"]
            ids = tokenizer.encode("quick", add_special_tokens=True)
            whole = (await s.complete([ids, "lazy"], n=2, max_tokens=1, echo=True)).json()
            assert [text[:4] for text in texts(whole)] == ["quic", "quic", "lazy", "lazy"]
            answer = await s.complete("hello", echo=True, stream=True, stop="ell")
            assert "".join(event["choices"][0]["text"] for event in events(answer)) == "helloh", "no stop in the echo"

    run(test)


def test_the_likeliest_choices_come_first() -> None:
    def choice(text: str, *logprobs: float) -> tuple[Delta, FinishReason]:
        return Delta(text, tuple((1, TokenLogprobs(value)) for value in logprobs)), STOP

    made = [choice("a", -3, -1), choice("b", -1), choice("c", -2.5), choice("d", -9), choice("e", -8), choice("f", -7)]
    found = best(made, 3, 2, keep_logprobs=False)
    assert [(delta.text, delta.choice, delta.logprobs) for delta, _ in found] == [
        ("b", 0, ()),
        ("a", 1, ()),
        ("f", 2, ()),
        ("e", 3, ()),
    ]
    assert best(made, 3, 1, keep_logprobs=True)[0][0].logprobs == ((1, TokenLogprobs(-1)),)


def test_best_of_generates_more_than_it_gives(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            whole = (await s.complete("hello, world", best_of=4, n=2)).json()
            assert len(texts(whole)) == 2 and whole["choices"][0]["logprobs"] is None
            [generate] = s.backend.started
            assert (generate.n, generate.sampling.num_logprobs) == (4, 0)
            kept = (await s.complete("hello, world", best_of=2, logprobs=1)).json()
            assert len(kept["choices"]) == 1 and kept["choices"][0]["logprobs"]["token_logprobs"]
            assert (
                whole["usage"]["completion_tokens"] > len(tokenizer.encode("hello, world", add_special_tokens=True)) * 2
            )

    run(test)


@pytest.mark.parametrize("keeps_match", [False, True])
def test_a_stop_string_is_kept_if_that_is_wanted(keeps_match: bool) -> None:
    scanner, given = StopScanner(["lo w", "wor"], keeps_match=keeps_match), ""
    for char in "hello world":
        if not scanner.hit:
            given += scanner.push(char)
    assert given == ("hello w" if keeps_match else "hel")


def test_include_stop_str_in_output(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            kept = await s.complete("hello, world", stop=", w", include_stop_str_in_output=True)
            assert texts(kept.json()) == ["hello, w"] and kept.json()["choices"][0]["finish_reason"] == "stop"

    run(test)
