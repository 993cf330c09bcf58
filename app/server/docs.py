"""`/docs`: a page of our own that draws `/openapi.json`, and nothing that comes from elsewhere.

The page needs no key to be seen, because a browser cannot send one with a link: it holds nothing
but its own text, and asks for the key to fetch the rest with.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_FILES = {
    "/docs": ("page.html", "text/html"),
    "/docs/page.css": ("page.css", "text/css"),
    "/docs/page.js": ("page.js", "text/javascript"),
}
PATHS = frozenset(_FILES)

_HEADERS = {
    # Nothing but these files and this endpoint, in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def router() -> APIRouter:
    """The page and its files; not part of the document that they show."""
    routes = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        routes.add_api_route(path, _file(name, media_type), methods=["GET"])
    return routes


def _file(name: str, media_type: str):  # type: ignore[no-untyped-def]  # a FastAPI endpoint
    content = files("app.server").joinpath("docs_page", name).read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_HEADERS)

    return answer
