"""What a client sees when all goes well."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mooncake.core.types import SamplingParams, Slo
from mooncake.frontend.tokenizer import Tokenizer

from .harness import events, run, site


def test_chat_stream_to_the_byte(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            s.backend.cached_tokens = 16
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "fox"}]}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": 5,
            }
            answer = await s.post("/v1/chat/completions", body, x_request_id="TEXT-1")
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["x-request-id"] == "TEXT-1"
            [generate] = s.backend.started
            texts = ["", *(tokenizer.decode([t]) for t in generate.token_ids[1:5])]
            head = (
                'data: {"id":"chatcmpl-TEXT-1","object":"chat.completion.chunk","created":0,"model":"tiny",'
                '"system_fingerprint":"fp_tiny","choices":['
            )
            chunk = head + '{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}\n\n'
            expected = chunk % ('{"role":"assistant","content":""}', "null")
            for text in texts:
                expected += chunk % ('{"content":' + json.dumps(text) + "}", "null")
            expected += chunk % ("{}", '"length"')
            num_prompt = len(generate.token_ids)
            expected += head + f'],"usage":{{"prompt_tokens":{num_prompt},"completion_tokens":5,'
            expected += f'"total_tokens":{num_prompt + 5},'
            expected += '"prompt_tokens_details":{"cached_tokens":16}}}\n\ndata: [DONE]\n\n'
            assert re.sub(r'"created":\d+', '"created":0', answer.text) == expected

    run(test)


def test_completion_stream_and_whole_agree(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            whole = (await s.complete("Ünïcödé 🎉 fox")).json()
            [choice] = whole["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("Ünïcödé 🎉 fox", "stop")
            chunks = events(await s.complete("Ünïcödé 🎉 fox", stream=True))
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
            assert len(chunks) == whole["usage"]["completion_tokens"]  # the end token has no chunk, the finish has
            assert "usage" not in chunks[0]
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    run(test)


@pytest.mark.parametrize("prompt", ["hello", ["hello"], "ids", "nested ids"])
def test_prompt_forms(tokenizer: Tokenizer, prompt: Any) -> None:
    async def test() -> None:
        ids = tokenizer.encode("hello", add_special_tokens=True)
        forms = {"ids": ids, "nested ids": [ids]}
        async with site(tokenizer) as s:
            answer = await s.complete(forms.get(prompt, prompt) if isinstance(prompt, str) else prompt)
            assert answer.json()["choices"][0]["text"] == "hello"
            assert s.backend.started[0].token_ids == ids

    run(test)


def test_parameters_reach_the_backend(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        fields = {
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -1, "presence_penalty": 1,
            "frequency_penalty": -2, "repetition_penalty": 1.1, "logit_bias": {"9": -100, "5": 1},
            "stop_token_ids": [11], "min_tokens": 2, "max_completion_tokens": 7, "max_tokens": 3, "user": "u",
            "metadata": {"a": "b"}, "cache_salt": "pepper", "n": 1, "tools": [], "response_format": {"type": "text"},
            "never_heard_of": {"x": [1]}, "logprobs": True, "top_logprobs": 2,
        }  # fmt: skip
        headers = {"x_request_id": "r", "x_mooncake_ttft_ms": "250", "x_mooncake_tbt_ms": "0.5"}
        headers["x_mooncake_priority"] = "-3"
        async with site(tokenizer) as s:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
            answer = await s.post("/v1/chat/completions", body, **headers)
            assert answer.status_code == 200
            [generate] = s.backend.started
            assert generate.sampling == SamplingParams(
                seed=2**63 - 1, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=1,
                frequency_penalty=-2, repetition_penalty=1.1, logit_bias=((5, 1.0), (9, -100.0)),
                stop_token_ids=(11, *tokenizer.eos_ids), min_tokens=2, num_logprobs=2,
            )  # fmt: skip
            assert (generate.max_tokens, generate.salt, generate.priority) == (7, "pepper", -3)
            assert generate.slo == Slo(ttft_ns=250_000_000, tbt_ns=500_000)
            await s.complete("x", ignore_eos=True, max_tokens=2)
            await s.complete("x", max_tokens=2)
            plain, other = s.backend.started[1:]
            assert plain.sampling == SamplingParams(seed=plain.sampling.seed)
            assert other.sampling.seed != plain.sampling.seed
            await s.complete("x")
            assert s.backend.started[-1].max_tokens == 4096 - 1

    run(test)


def test_logprobs(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        ids = tokenizer.encode("a🦊", add_special_tokens=False)
        async with site(tokenizer) as s:
            [choice] = (await s.complete(ids, logprobs=1, max_tokens=3)).json()["choices"]
            tokens = ["a", "\ufffd", "\ufffd"]
            assert choice["text"] == "a\ufffd"
            assert choice["logprobs"]["tokens"] == tokens
            assert choice["logprobs"]["token_logprobs"] == [-0.5] * 3
            assert choice["logprobs"]["top_logprobs"] == [{token: -0.5} for token in tokens]
            assert choice["logprobs"]["text_offset"] == [0, 1, 2]
            chunks = events(await s.complete(ids, logprobs=0, max_tokens=3, stream=True))
            found = [t for c in chunks if c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["tokens"]]
            assert found == tokens
            chunks = events(await s.chat("a", logprobs=True, top_logprobs=1, max_tokens=1, stream=True))
            [entry] = chunks[1]["choices"][0]["logprobs"]["content"]
            assert entry["token"] == "<|im_start|>" and entry["bytes"] == list(b"<|im_start|>")
            assert len(entry["top_logprobs"]) == 1

    run(test)


def test_stop_strings_over_token_borders(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            prompt = "hello, world hello, world"
            for stream in (False, True):
                answer = await s.complete(prompt, stop=["o, wor", "zzz"], stream=stream, ignore_eos=True)
                parts = events(answer) if stream else [answer.json()]
                assert "".join(p["choices"][0]["text"] for p in parts) == "hell"
                assert parts[-1]["choices"][0]["finish_reason"] == "stop"
            assert s.backend.num_cancelled == 2 and s.backend.num_running == 0
            answer = await s.complete(prompt, stop="o, wor", min_tokens=3, max_tokens=4)
            assert answer.json()["choices"][0]["text"].startswith("hello, world")
            kept = await s.complete("hello, wor", stop=", world!")
            assert kept.json()["choices"][0]["text"] == "hello, wor"

    run(test)


def by_choice(chunks: list[Any]) -> dict[int, tuple[str, list[str]]]:
    """Of each index in the chunks, its text and its finish reasons."""
    found: dict[int, tuple[str, list[str]]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            text, reasons = found.get(piece["index"], ("", []))
            text += piece["text"] if "text" in piece else piece["delta"].get("content", "")
            found[piece["index"]] = (text, reasons + [r for r in [piece["finish_reason"]] if r])
    return found


def test_choices_have_texts_ends_and_indices_of_their_own(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        ids = tokenizer.encode("hello, world", add_special_tokens=False)
        texts = {choice: (tokenizer.decode(ids[choice:]), ["stop"]) for choice in range(3)}
        async with site(tokenizer) as s:
            s.backend.cached_tokens = 2
            whole = (await s.complete(ids, n=3)).json()
            assert {c["index"]: (c["text"], [c["finish_reason"]]) for c in whole["choices"]} == texts
            num_output = sum(len(ids) - choice + 1 for choice in range(3))
            assert whole["usage"] == {
                "prompt_tokens": len(ids),
                "completion_tokens": num_output,
                "total_tokens": len(ids) + num_output,
                "prompt_tokens_details": {"cached_tokens": 2},
            }
            answer = await s.complete(ids, n=3, stream=True, stream_options={"include_usage": True})
            *chunks, last = events(answer)
            assert by_choice(chunks) == texts and all(len(chunk["choices"]) == 1 for chunk in chunks)
            assert last["choices"] == [] and last["usage"] == whole["usage"]
            assert s.backend.started[-1].n == 3
            chunks = events(await s.chat("hi", n=2, stream=True, max_tokens=3))
            assert [c["choices"][0]["index"] for c in chunks[:2]] == [0, 1]
            assert all(c["choices"][0]["delta"] == {"role": "assistant", "content": ""} for c in chunks[:2])
            assert {index: reasons for index, (_, reasons) in by_choice(chunks).items()} == {
                0: ["length"],
                1: ["length"],
            }
            metrics = (await s.client.get("/metrics")).text
            assert f"mooncake_frontend_output_tokens_total {2 * num_output + 6}.0" in metrics
            assert (
                f"mooncake_frontend_prompt_tokens_total {2 * len(ids) + len(s.backend.started[-1].token_ids)}.0"
                in metrics
            )

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_choice_alone(tokenizer: Tokenizer, stream: bool) -> None:
    async def test() -> None:
        ids = tokenizer.encode("xa, yb, z", add_special_tokens=False)
        async with site(tokenizer) as s:
            answer = await s.complete(ids, n=2, stop="xa", stream=stream, max_tokens=len(ids) - 1, logprobs=0)
            parts = events(answer) if stream else [answer.json()]
            assert by_choice(parts) == {0: ("", ["stop"]), 1: (tokenizer.decode(ids[1:]), ["length"])}
            assert s.backend.num_cancelled == 1 and s.backend.num_running == 0
            offsets = [
                c["logprobs"]["text_offset"] for p in parts for c in p["choices"] if c["index"] and c["logprobs"]
            ]
            assert [offset for each in offsets for offset in each][:2] == [0, len(tokenizer.decode(ids[1:2]))]

    run(test)


def test_pages(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            assert (await s.client.get("/health")).json() == {"status": "ok"}
            assert (await s.client.get("/ready")).json()["ready"] is True
            s.backend.ready = False
            unready = await s.client.get("/ready")
            assert (unready.status_code, unready.json()["reason"]) == (503, "the echo is told to be silent")
            assert (await s.client.get("/health")).status_code == 200
            models = (await s.client.get("/v1/models")).json()
            assert [card["id"] for card in models["data"]] == ["tiny"]
            assert (await s.client.get("/v1/models/tiny")).json() == models["data"][0]
            await s.complete("hello", max_tokens=2)
            text = (await s.client.get("/metrics")).text
            for line in (
                'mooncake_frontend_requests_total{code="200",endpoint="completions"} 1.0',
                "mooncake_frontend_output_tokens_total 2.0",
                "mooncake_frontend_ttft_seconds_count 1.0",
                "mooncake_frontend_itl_seconds_count 1.0",
                "mooncake_frontend_requests_running 0.0",
                "mooncake_frontend_ready 0.0",
            ):
                assert line in text

    run(test)
