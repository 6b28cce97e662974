"""Which addresses are of this machine, and whose keys count."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from mooncake.frontend.errors import ApiError
from mooncake.frontend.guard import Guard


def request(client: str | None, host: str = "127.0.0.1:8000", key: str | None = None) -> Request:
    headers = [(b"host", host.encode())]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    address = (client, 5) if client is not None else None
    return Request({"type": "http", "method": "GET", "path": "/", "headers": headers, "client": address})


def refusal(asked: Request, token: str = "t") -> int:
    """The status, or 0."""
    try:
        Guard(token, lambda key: key == "mk-admin").check(asked)
    except ApiError as error:
        return error.status
    return 0


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_this_machine(client: str) -> None:
    assert refusal(request(client)) == 0


@pytest.mark.parametrize("client", ["10.0.0.1", "192.168.1.5", "::ffff:10.0.0.1", "fe80::1", "0.0.0.0", "unix", None])
def test_all_else_is_not(client: str | None) -> None:
    assert refusal(request(client)) == 403
    assert refusal(request(client, key="t")) == 0
    assert refusal(request(client, key="mk-admin")) == 0
    assert refusal(request(client, key="mk-user")) == 401


@pytest.mark.parametrize("host", ["", "example.com", "[bad", "127.0.0.1.example.com", "localhost.example.com"])
def test_a_name_that_is_not_this_machines_is_not_trusted(host: str) -> None:
    assert refusal(request("127.0.0.1", host)) == 403


def test_a_cluster_without_a_token_admits_no_empty_key() -> None:
    assert refusal(request("10.0.0.1", key=""), token="") == 401
