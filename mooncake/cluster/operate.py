"""The operator's side of a frontend's /admin endpoints: where the frontend is, and what it is asked.

--url       as given; on this machine no key is needed, elsewhere MOONCAKE_TOKEN: the cluster's token, or an admin key
--run-dir   of a `mooncake serve` that runs here: its address and token are in config.json
neither     the run folder of the cluster named by MOONCAKE_CLUSTER, or http://127.0.0.1:8000
"""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mooncake.cluster.screen import base_url
from mooncake.config import Config, load_config
from mooncake.core.errors import ConfigError, ProcessError
from mooncake.frontend.overview import Overview

TIMEOUT_S = 15.0
"""The Conductor has timeouts.rpc_s of it."""
WAIT_S = 600.0
"""How long `drain --wait` waits if it is not told."""
_POLL_S = 0.5
_FINAL = ("drained", "lost")


class NoAnswer(ConfigError):
    """Nobody is there, or it is not a frontend."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token goes to whom the operator named, and to nobody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Frontend:
    """One frontend. The token is sent to it, so its address comes from the same place, or from the user."""

    def __init__(self, url: str, token: str = "", ca: str | None = None) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url!r}: must begin with http:// or https://")
        self._token = token
        context = ssl.create_default_context(cafile=ca) if self.url.startswith("https://") else None
        # No proxy of the environment stands between an operator and the cluster.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _NoRedirect(), urllib.request.HTTPSHandler(context=context)
        )

    def status(self) -> Overview:
        try:
            return msgspec.json.decode(self._ask("GET", "/admin/status"), type=Overview)
        except msgspec.DecodeError as error:
            raise NoAnswer(f"{self.url}: its status is of another version: {error}") from None

    def explain(self, name: str) -> str:
        found = msgspec.json.decode(self._ask("GET", f"/admin/explain?id={urllib.parse.quote(name, safe='')}"))
        return str(found["text"])

    def hold(self, name: str, held: bool) -> str:
        verb = "drain" if held else "undrain"
        found = msgspec.json.decode(self._ask("POST", f"/admin/{verb}/{urllib.parse.quote(name, safe='')}"))
        return str(found["text"])

    def _ask(self, method: str, path: str) -> bytes:
        """Raises NoAnswer, or with the frontend's sentence ConfigError if the question is at fault, else ProcessError."""
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)  # noqa: S310  checked above
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise (ConfigError if error.code < 500 else ProcessError)(_sentence(error, self.url)) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NoAnswer(
                f"no frontend answers at {self.url}: {getattr(reason, 'strerror', None) or reason}"
            ) from None


def _sentence(error: urllib.error.HTTPError, url: str) -> str:
    with error:
        body = error.read()
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"{url} is no Mooncake frontend: it answered with HTTP status {error.code}"


def find_frontend(url: str | None, run_dir: str | None) -> Frontend:
    """Raises ConfigError."""
    own = load_config()
    if url is not None:
        return Frontend(url, own.token, own.tls.ca)
    folder = Path(run_dir or own.run_dir)
    file = folder / "config.json"
    if file.exists():
        return _of_config(load_config(str(file), environ={}))
    if run_dir is not None:
        raise NoAnswer(f"run_dir = {run_dir!r}: no cluster runs there")
    return _of_config(own)


def _of_config(config: Config) -> Frontend:
    return Frontend(base_url(config), config.token, config.tls.ca or config.tls.cert)


def wait_drained(frontend: Frontend, name: str, wait_s: float, say: Callable[[str], None]) -> bool:
    """Until the instance is drained; False if it is not within wait_s, or gone before."""
    deadline = time.monotonic() + wait_s
    told: Any = None
    while True:
        cluster = frontend.status().cluster
        found = next((each for each in cluster.instances if each.name == name), None) if cluster is not None else None
        if cluster is not None and (found is None or found.state in _FINAL):
            say(f"{name} is {found.state if found is not None else 'gone'}")
            return found is not None and found.state == "drained"
        left = found and (found.num_prefills + found.num_decodes, found.num_waiting + found.num_running)
        if found is not None and left != told:
            told = left
            say(f"{name}: {left[0]} requests booked, {left[1]} at it" if left else name)
        if time.monotonic() >= deadline:
            say(f"{name} is not drained after {wait_s:g} s")
            return False
        time.sleep(_POLL_S)
