"""Clients as users have them, each in an environment of its own, against real clusters: what they show is what was said.

Each client's script (`tests/clients/NAME/`) asks the same requests. Plain HTTP tells what the answers are, and these are held
against what was asked, so that client and server cannot be wrong together.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.environments import CannotBeHad, node_with, python_with
from tests.clients import plain
from tests.clients.cases import CITIES, NUM_CHOICES, NUM_SEEDED, NUM_TOP, Request, content, faults
from tests.live.harness import MODEL, Cluster, clean_environment
from tests.live.models import save_tiny_model
from tests.live.test_exact import FLOAT32
from tests.live.test_tenants import keys

SCRIPTS = Path(plain.__file__).parent
CLIENT_S = 120.0
MAX_CONTEXT = 512
ERRORS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
"""Of the client libraries. Their own errors for these are kinds of them."""
Facts = dict[str, Any]


class Client(NamedTuple):
    """script, packages: files under `tests/clients`. kinds: what of the API it speaks. cannot: names of requests that it has
    no way to ask, or whose answers it does not show whole. too_long: its own error for a prompt beyond the context."""

    script: str
    packages: str
    kinds: tuple[str, ...] = ("chat", "text")
    cannot: tuple[str, ...] = ()
    too_long: str = "BadRequestError"

    def can(self, request: Request) -> bool:
        return request["kind"] in self.kinds and request["name"] not in self.cannot

    def ask(self, site: Site, requests: list[Request]) -> dict[str, Facts]:
        """What it shows, by the requests' names."""
        done = subprocess.run(
            [*self._command(), f"{site.cluster.url}/v1", MODEL],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            timeout=CLIENT_S,
            env=clean_environment() | {"PYTHONPATH": str(SCRIPTS / "common"), "OPENAI_API_KEY": site.key},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Facts] = json.loads(done.stdout)
        return found

    def _command(self) -> list[str]:
        script, packages = SCRIPTS / self.script, SCRIPTS / self.packages
        try:
            if packages.suffix != ".json":
                return [str(python_with(packages)), str(script)]
            folder = node_with(packages)  # modules are looked for beside the script
            return [str(folder / "node_modules/.bin/node"), str(shutil.copy(script, folder))]
        except CannotBeHad as error:
            pytest.skip(f"the client's packages cannot be had: {error}")


ALL_KINDS = ("chat", "text", "responses", "embeddings", "models")
CLIENTS = {
    "openai-python 2": Client("openai_python/talk.py", "openai_python/requirements-2.txt", ALL_KINDS),
    "openai-python 3": Client("openai_python/talk.py", "openai_python/requirements-3.txt", ALL_KINDS),
    "openai-node": Client("openai_node/talk.mjs", "openai_node/package.json", ALL_KINDS),
    "langchain-openai": Client(
        "langchain_openai/talk.py",
        "langchain_openai/requirements.txt",
        cannot=("n, streamed", "text n, streamed"),  # it refuses the first, and mixes the choices of the second
        too_long="ContextOverflowError",
    ),
    "litellm": Client(
        "litellm/talk.py",
        "litellm/requirements.txt",
        cannot=(
            "n, streamed",
            "text logprobs, streamed",
        ),  # it drops all finish reasons but one, and all log probabilities
        too_long="ContextWindowExceededError",
    ),
    "llm": Client(
        "llm/talk.py",
        "llm/requirements.txt",
        cannot=tuple(
            name + streamed
            for name in ("n", "text n", "logprobs", "tools", "tool results", "not served")  # it has no such options
            for streamed in ("", ", streamed")
        ),
    ),
}


class Site(NamedTuple):
    """A cluster, and what it answers to each request by plain HTTP."""

    cluster: Cluster
    key: str
    requests: list[Request]
    expected: dict[str, Facts]


def site(cluster: Cluster, requests: list[Request], key: str = "none") -> Site:
    expected = {request["name"]: plain.ask(f"{cluster.url}/v1", MODEL, key, request) for request in requests}
    return Site(cluster, key, requests, expected)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Answers with content: any words of the real model's vocabulary."""
    model = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    named = ("--model", str(model), "--model-name", MODEL)
    with Cluster(*FLOAT32, *named, "--store-memory", "128MiB") as cluster:
        first = site(cluster, content(stop="Nowhere"))  # from now on all prompts are cached
        yield site(cluster, content(stop=text_of(first.expected["chat"])[20:26]))


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Answers with errors: it wants keys, and no request can be served as soon as is wanted."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    key = keys(file, "add", "--tenant", "me")
    options = ("--api-keys", str(file), "--admission", "hard", "--slo-ttft-s", "0.000001")
    with Cluster("--engine", "simulated", "--max-context", str(MAX_CONTEXT), *options) as cluster:
        yield site(cluster, faults(MAX_CONTEXT), key)


def text_of(facts: Facts) -> str:
    [choice] = facts["choices"]
    return str(choice["text"])


def shown(seen: Any, expected: Any) -> Any:
    """Of what is expected, what the client shows."""
    if isinstance(seen, dict):
        return {name: shown(seen[name], expected[name]) for name in seen}
    if isinstance(seen, list) and isinstance(expected, list) and len(seen) == len(expected):
        return list(map(shown, seen, expected))
    return expected


def check(client: Client, site: Site) -> None:
    requests = [request for request in site.requests if client.can(request)]
    seen = client.ask(site, requests)
    assert list(seen) == [request["name"] for request in requests]
    for name, facts in seen.items():
        expected = site.expected[name]
        if "error" in facts:
            classes = facts["error"].pop("classes")
            too_long = expected["error"]["code"] == "context_length_exceeded"
            assert (client.too_long if too_long else ERRORS[facts["error"]["status"]]) in classes, name
        assert facts == shown(facts, expected), name


@pytest.mark.parametrize("name", CLIENTS)
def test_content(talking: Site, name: str) -> None:
    check(CLIENTS[name], talking)


@pytest.mark.parametrize("name", CLIENTS)
def test_errors(refusing: Site, name: str) -> None:
    check(CLIENTS[name], refusing)


def test_streams_say_the_same(talking: Site, refusing: Site) -> None:
    for found in (talking, refusing):
        for name, facts in found.expected.items():
            assert facts == found.expected[name.removesuffix(", streamed")], name


def test_texts() -> None:
    """The real model's."""
    with Cluster(*FLOAT32, "--store-memory", "128MiB") as cluster:
        asked = {request["name"]: request for request in content(stop="is Par")}
        found = [plain.ask(f"{cluster.url}/v1", MODEL, "none", asked[name]) for name in ("chat", "stop", "text")]
    chat, stop, text = found
    assert text_of(chat) == "The capital of France is Paris."
    assert text_of(stop) == "The capital of France "
    assert {facts["choices"][0]["finish"] for facts in (chat, stop)} == {"stop"}
    assert text["choices"][0]["finish"] == "length" and text["usage"][1] == NUM_SEEDED
    assert chat["usage"][2] < 32 <= stop["usage"][2] < stop["usage"][0] and chat["usage"][1] > 6


def test_a_stop_string_ends_the_text(talking: Site) -> None:
    chat, stop = talking.expected["chat"], talking.expected["stop"]
    assert text_of(stop) == text_of(chat)[:20]
    assert [facts["choices"][0]["finish"] for facts in (chat, stop)] == ["length", "stop"]
    prompt, _, cached = chat["usage"]
    assert prompt > cached >= 32


@pytest.mark.parametrize("name", ["logprobs", "text logprobs"])
def test_log_probabilities(talking: Site, name: str) -> None:
    facts = talking.expected[name]
    [choice] = facts["choices"]
    tokens = choice["logprobs"]
    assert "".join(token for token, _, _ in tokens) == choice["text"] and len(tokens) == facts["usage"][1]
    for token, logprob, tops in tokens:
        assert len(tops) == NUM_TOP and tops[0] == [token, logprob], "greedy: the most probable token was taken"
        assert 0 >= tops[0][1] > tops[1][1]


@pytest.mark.parametrize("name", ["n", "text n"])
def test_choices(talking: Site, name: str) -> None:
    facts = talking.expected[name]
    assert len({choice["text"] for choice in facts["choices"]}) == NUM_CHOICES
    assert facts["usage"][1] == NUM_CHOICES * NUM_SEEDED


def test_errors_are_what_was_wrong(refusing: Site) -> None:
    wrong = {
        "bad value": (400, "logit_bias", None),
        "not served": (400, "suffix", "unsupported_parameter"),
        "too long": (400, "messages", "context_length_exceeded"),
        "unknown model": (404, "model", "model_not_found"),
        "wrong key": (401, None, "invalid_api_key"),
        "overloaded": (429, None, "overloaded"),
        "text overloaded": (429, None, "overloaded"),
    }
    seen = {name: refusing.expected[name]["error"] for name in wrong}
    assert {name: (error["status"], error["param"], error["code"]) for name, error in seen.items()} == wrong
    assert all((error["retry_after"] is not None) == (error["status"] == 429) for error in seen.values())


@pytest.mark.parametrize("name", ["tools", "structured"])
def test_grammars(talking: Site, name: str) -> None:
    [choice] = talking.expected[name]["choices"]
    if name == "structured":
        answer = json.loads(choice["text"])
        assert answer["city"] in CITIES and isinstance(answer["big"], bool) and len(answer) == 2
        return
    assert choice["finish"] == "tool_calls" and choice["tools"]
    for called, arguments in choice["tools"]:
        assert called == "weather" and arguments["city"] in CITIES and arguments["hours"] in range(1, 10)
