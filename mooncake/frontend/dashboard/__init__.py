"""The page at /dashboard: plain files, which ask GET /admin/status every two seconds. They hold no data of the cluster, so
they are served to everybody; what they ask is guarded.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "index.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "format.js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def dashboard_routes() -> list[Route]:
    folder = Path(__file__).parent
    routes = [_route(f"/dashboard/{name}", folder / name, media_type) for name, media_type in _FILES.items()]
    return [_route("/dashboard", folder / "index.html", _FILES["index.html"]), *routes]


def _route(path: str, file: Path, media_type: str) -> Route:
    content = file.read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return Route(path, answer, methods=["GET"])
