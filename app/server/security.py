"""Who may talk to the endpoint, and how much: checks that run before any handler.

A loopback port is reachable by every web page the user opens. A page is kept out by its Origin,
by the Host name its requests carry after DNS rebinding (CVE-2024-28224), and by requiring a content
type that a page cannot send without asking first. `guards` lists the checks from the outside in.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Callable, Collection, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import GryphonError
from app.server.errors import ApiError, ErrorResponse

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
MAX_BODY_BYTES = 16 * 1024 * 1024
BODY_TIMEOUT_S = 60.0

EDITOR_SCHEMES = frozenset({"vscode-webview", "vscode-file", "app", "tauri"})
"""Schemes of pages that belong to installed programs; no web site can have such an origin."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::[0-9]{1,5})?")
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


def guards(
    *,
    allow_hosts: Iterable[str] = (),
    allow_ip_hosts: bool = False,
    allow_origins: Iterable[str] = (),
    api_key: str | None = None,
    public: Collection[str] = (),
    at_path: bool = False,
    is_full: Callable[[], bool] = lambda: False,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> list[Middleware]:
    """The checks as Starlette middleware, outermost first.

    Args:
        allow_hosts: Host names accepted besides the loopback ones.
        allow_ip_hosts: Accept any IP address as Host; DNS rebinding needs a name.
        allow_origins: Origins accepted besides the server's own and the editors' schemes.
        api_key: Required of every request when set.
        public: Paths that need no key all the same.
        at_path: The endpoint is a UNIX socket, which no web page can reach by any name: the Host
            says nothing, and there is no origin of its own.
        is_full: Whether no more requests are taken for now.
        max_body_bytes: Longest request body.
        body_timeout_s: How long one may take to come.

    Raises:
        GryphonError: an origin is not one, or the key is empty.
    """
    origins = [_origin(origin) for origin in allow_origins]
    checks = [
        Middleware(ConnectionLimit, is_full=is_full),
        Middleware(FramingCheck),
        Middleware(OriginCheck, allow_origins=origins, has_own=not at_path),
    ]
    if not at_path:
        hosts = Middleware(HostCheck, allow_hosts=allow_hosts, allow_ip_hosts=allow_ip_hosts)
        checks.insert(2, hosts)
    if api_key is not None:
        if not api_key.strip():
            raise GryphonError("invalid_api_key", "The API key must not be empty.")
        checks.append(Middleware(KeyCheck, api_key=api_key, public=public))
    checks.append(Middleware(JsonOnly))
    checks.append(Middleware(BodyLimit, max_bytes=max_body_bytes, timeout_s=body_timeout_s))
    return checks


def _origin(text: str) -> str:
    """`text` as browsers write an origin: scheme://host[:port], lower case, no slash at the end."""
    origin = text.strip().lower().rstrip("/")
    # "*" would let every web page read the user's chats; whoever wants that can name the pages.
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*?#]+", origin):
        raise GryphonError(
            "invalid_origin",
            f'"{text}" is not an origin: expected scheme://host[:port], '
            "for example http://localhost:3000.",
        )
    return origin


class ConnectionLimit:
    """Refuse requests while there are too many connections."""

    def __init__(self, app: ASGIApp, is_full: Callable[[], bool]) -> None:
        self.app = app
        self.is_full = is_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.is_full():
            error = ApiError(
                503, "too_many_connections", "Too many connections are open; try again soon."
            )
            await ErrorResponse(error, {"connection": "close"})(scope, receive, send)
            return
        await self.app(scope, receive, send)


class FramingCheck:
    """Refuse requests that say twice, and differently, where they end.

    h11 goes by Transfer-Encoding then, and a proxy in front may go by Content-Length: what one
    takes for the body is the next request for the other.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if "content-length" in headers and "transfer-encoding" in headers:
                error = ApiError(
                    400, "invalid_http", "Send Content-Length or Transfer-Encoding, not both."
                )
                await ErrorResponse(error, {"connection": "close"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class HostCheck:
    """Refuse requests addressed to a name that is not ours."""

    def __init__(
        self, app: ASGIApp, allow_hosts: Iterable[str] = (), allow_ip_hosts: bool = False
    ) -> None:
        self.app = app
        self.hosts = LOOPBACK_HOSTS | {host.lower() for host in allow_hosts}
        self.allow_ip_hosts = allow_ip_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allowed(Headers(scope=scope).getlist("host")):
            error = ApiError(
                403,
                "host_not_allowed",
                "This endpoint answers to localhost, 127.0.0.1 and [::1] only; "
                "use one of them as the host.",
            )
            await ErrorResponse(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allowed(self, values: list[str]) -> bool:
        match = _HOST.fullmatch(values[0].lower()) if len(values) == 1 else None
        if match is None:
            return False
        return match[1] in self.hosts or (self.allow_ip_hosts and _is_ip(match[1].strip("[]")))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class OriginCheck:
    """Refuse web pages, also those on another port of this machine; answer CORS for the others.

    Programs send no Origin and pass. Pages send none with what they only embed (a GET as image or
    script); there the browser tells by Sec-Fetch-Site that another site asks. `HostCheck` comes
    first: the server's own origin is taken from the Host it let through.
    """

    def __init__(
        self, app: ASGIApp, allow_origins: Iterable[str] = (), has_own: bool = True
    ) -> None:
        self.app = app
        self.origins = frozenset(allow_origins)
        self.has_own = has_own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origins = headers.getlist("origin")
        if not origins and not _is_embedded(headers):
            await self.app(scope, receive, send)
            return
        own = f"{scope['scheme']}://{headers.get('host', '')}"
        if len(origins) != 1 or not self._allowed(origins[0].lower(), own.lower()):
            error = ApiError(
                403,
                "origin_not_allowed",
                "Web pages may not use this endpoint; to let one in, name its origin: "
                "gryphon serve --allow-origin ORIGIN.",
            )
            await ErrorResponse(error)(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                outgoing = MutableHeaders(scope=message)
                outgoing["access-control-allow-origin"] = origins[0]
                outgoing["access-control-expose-headers"] = "x-request-id, retry-after"
                outgoing.add_vary_header("Origin")
            await send(message)

        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await self._preflight(headers)(scope, receive, send_with_cors)
        else:
            await self.app(scope, receive, send_with_cors)

    def _allowed(self, origin: str, own: str) -> bool:
        scheme, separator, _ = origin.partition("://")
        return (
            (self.has_own and origin == own)
            or origin in self.origins
            or (bool(separator) and scheme in EDITOR_SCHEMES)
        )

    def _preflight(self, headers: Headers) -> Response:
        # Browsers ask without credentials, so the key is not looked at here.
        answer = {
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-allow-headers": headers.get(
                "access-control-request-headers", "authorization, content-type, x-api-key"
            ),
            "access-control-max-age": "600",
        }
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return Response(status_code=204, headers=answer)


def _is_embedded(headers: Headers) -> bool:
    """Whether a page of another site asks for something to use in itself; a person who follows a
    link from there only comes here."""
    foreign = headers.get("sec-fetch-site", "") in ("cross-site", "same-site")
    return foreign and headers.get("sec-fetch-mode", "") != "navigate"


class KeyCheck:
    """Require the API key, as `Authorization: Bearer KEY` or `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, api_key: str, public: Collection[str] = ()) -> None:
        self.app = app
        self.api_key = api_key.encode()
        self.public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_private = scope["type"] == "http" and scope["path"] not in self.public
        if is_private and not self._has_key(scope):
            error = ApiError(
                401,
                "invalid_api_key",
                "This endpoint needs its API key, as `Authorization: Bearer KEY` or `x-api-key`.",
            )
            response = ErrorResponse(error, {"www-authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = b""
        for name, value in scope["headers"]:
            if name == b"x-api-key":
                given = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        return hmac.compare_digest(given, self.api_key)


class JsonOnly:
    """Require `application/json` where there is a body.

    A page may send text/plain or a form across origins unasked; JSON needs a preflight first. A
    body without any type passes if no page can have sent it: browsers say where a request with a
    body comes from, and some programs (litellm) leave the type out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What no route takes gets its 404 or 405 instead.
        if scope["type"] == "http" and scope["method"] in _WITH_BODY and _is_routed(scope):
            headers = Headers(scope=scope)
            given = headers.get("content-type")
            is_page = "origin" in headers or "sec-fetch-site" in headers
            is_json = (given or "").partition(";")[0].strip().lower() == "application/json"
            if not is_json and (given is not None or is_page):
                error = ApiError(
                    415,
                    "unsupported_media_type",
                    "Send the body as JSON with the header `Content-Type: application/json`.",
                )
                await ErrorResponse(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _is_routed(scope: Scope) -> bool:
    return any(route.matches(scope)[0] == Match.FULL for route in scope["app"].routes)


class _RefusedBody(Exception):
    """Raised out of `receive` into whoever reads the body."""

    def __init__(self, error: ApiError) -> None:
        self.error = error


class BodyLimit:
    """Refuse long bodies, at once when Content-Length says so, else when the limit is passed; and
    those that take too long to come."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_long = ApiError(
            413, "request_too_large", f"The body is longer than {self.max_bytes} bytes."
        )
        received = 0
        is_whole = False
        deadline = asyncio.get_running_loop().time() + self.timeout_s

        async def limited_receive() -> Message:
            nonlocal received, is_whole
            if is_whole:  # what is waited for now is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _RefusedBody(
                    ApiError(
                        408, "body_timeout", f"The body did not come within {self.timeout_s:g} s."
                    )
                ) from None
            is_whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise _RefusedBody(too_long)
            return message

        # h11 has made sure that the value is a number of at most 20 digits.
        announced = Headers(scope=scope).get("content-length", "0")
        try:
            if int(announced) > self.max_bytes:
                raise _RefusedBody(too_long)
            await self.app(scope, limited_receive, send)
        except _RefusedBody as refused:
            # The rest of the body is read and dropped by uvicorn, so that the client, which may
            # still be sending, gets to read this answer instead of a reset connection.
            await ErrorResponse(refused.error)(scope, receive, send)
