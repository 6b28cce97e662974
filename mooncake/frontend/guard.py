"""Who may use the operator's endpoints: processes of this machine, and whoever has the cluster's token or an admin key.

That a connection comes from this machine is not enough where others speak through it: a proxy (which says for whom), or a
page of another site in a browser here (whose requests name another origin, or reach us by a name that is not this machine's).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import Request

from mooncake.frontend.errors import ApiError

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")
_HINT = "send the cluster's token or an admin key as `Authorization: Bearer ...`"


class Guard:
    """token: the cluster's. is_admin_key: tells of a key that it is an admin's."""

    def __init__(self, token: str, is_admin_key: Callable[[str], bool] = lambda key: False) -> None:
        self._token = token
        self._is_admin_key = is_admin_key

    def check(self, request: Request) -> None:
        """Raises ApiError: 401 for a wrong key, 403 without one from elsewhere."""
        credentials = request.headers.get("authorization")
        if credentials is not None:
            scheme, _, key = credentials.partition(" ")
            if scheme.lower() != "bearer" or not self._knows(key.strip()):
                raise ApiError(401, f"the key is not an operator's; {_HINT}", code="invalid_api_key")
        elif not _is_local(request):
            message = f"the operator's endpoints answer this machine only; from elsewhere {_HINT}"
            raise ApiError(403, message, code="forbidden")

    def _knows(self, key: str) -> bool:
        is_token = bool(self._token) and hmac.compare_digest(key.encode(), self._token.encode())
        return is_token or self._is_admin_key(key)


def _is_local(request: Request) -> bool:
    if any(header in request.headers for header in _PROXY_HEADERS):
        return False
    if request.client is None or not _is_loopback(request.client.host):
        return False
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    own_site = origin is None or urlsplit(origin).netloc == host
    return own_site and _is_loopback(_name(host)) and request.headers.get("sec-fetch-site") != "cross-site"


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
