"""Errors as HTTP answers, in the shape that the clients of a route's dialect read.

The path tells which that is, for the checks in front of every dialect too. A message is one
sentence for a person; a traceback goes to the log at most.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.protocol import Failed
from app.errors import GryphonError

logger = logging.getLogger(__name__)

_STATUS = {
    "context_length_exceeded": 400,
    "invalid_request": 400,
    "invalid_sampling": 400,
    "template_error": 400,
    "prompt_too_slow": 400,
    "prompt_failed": 400,
    "request_too_large": 400,
    "invalid_text": 400,
    "invalid_model": 400,
    "invalid_constraint": 400,
    "unsupported_constraint": 400,
    "no_infill": 400,
    "no_embeddings": 400,
    "does_not_fit": 400,
    "model_not_found": 404,
    "no_model_installed": 404,
    "model_busy": 503,
    "queue_full": 503,
    "out_of_memory": 503,
    "engine_restarting": 503,
    "engine_stopped": 503,
    "model_crashes_engine": 503,
    "cancelled": 503,
    "server_stopping": 503,
    "client_too_slow": 503,
}
"""HTTP status by error code; any other code is our fault: 500."""


class ApiError(GryphonError):
    """An error that knows its HTTP status and, where one is to blame, the request's field."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, message, retry_after=retry_after)
        self.status = status
        self.param = param

    @classmethod
    def of(cls, error: GryphonError | Failed) -> ApiError:
        """`error` with the status its code stands for."""
        if isinstance(error, ApiError):
            return error
        status = _STATUS.get(error.code, 500)
        return cls(status, error.code, error.message, retry_after=error.retry_after)


def openai_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that OpenAI's clients read."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def ollama_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that Ollama's clients read."""
    return {"error": error.message}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that Anthropic's clients read."""
    other = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, other)
    message = error.message
    if error.code == "context_length_exceeded":
        # Anthropic's own words for it, which Claude Code knows.
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


_LLAMA_CPP_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


def llama_cpp_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that llama.cpp's clients read."""
    kind = _LLAMA_CPP_TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {"error": {"code": error.status, "message": error.message, "type": kind}}


_BODIES: dict[str, Callable[[ApiError], dict[str, Any]]] = {
    "/api/": ollama_body,
    "/v1/messages": anthropic_body,
    "/infill": llama_cpp_body,
    "/props": llama_cpp_body,
    "/tokenize": llama_cpp_body,
    "/detokenize": llama_cpp_body,
}
"""Shapes by how the path begins; OpenAI's everywhere else."""


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The JSON object for `error` on a route: in its dialect's shape."""
    shapes = (shape for begin, shape in _BODIES.items() if path.startswith(begin))
    return next(shapes, openai_body)(error)


def internal_error() -> ApiError:
    """What a client learns about a fault of ours."""
    return ApiError(500, "internal_error", "Internal error in Gryphon; its server log says more.")


def server_stopping() -> ApiError:
    """What a client learns whose answer is not ready when the server stops."""
    return ApiError(503, "server_stopping", "Gryphon is closing, so the answer ends here.")


def log_fault(where: str, error: BaseException) -> None:
    """Log an unexpected exception: its type and stack, not its text, which may quote a prompt."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", where, type(error).__qualname__, stack)


class JsonResponse(Response):
    """A JSON answer, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class ErrorResponse(JsonResponse):
    """The whole answer for an error, in the shape of the dialect that it is sent to."""

    def __init__(self, error: GryphonError | Failed, headers: dict[str, str] | None = None) -> None:
        self.error = ApiError.of(error)
        self.extra_headers = dict(headers or {})
        if self.error.status == 503:
            # Trying again makes sense.
            seconds = max(1, math.ceil(self.error.retry_after or 1))
            self.extra_headers["retry-after"] = str(seconds)
        super().__init__(openai_body(self.error), self.error.status, self.extra_headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = error_body(scope["path"], self.error)
        whole = JsonResponse(body, self.error.status, self.extra_headers)
        await whole(scope, receive, send)


class CatchFaults:
    """Turn an exception nobody expected into a plain 500 and a line in the log.

    Starlette's own handler re-raises after answering, and uvicorn then prints the traceback; this
    sits inside both. An answer already begun is left incomplete, which makes uvicorn cut the
    connection: the client sees a broken answer rather than a short one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ClientDisconnect:
            pass  # left before its body was whole: nobody is there to be answered
        except asyncio.CancelledError:
            # By uvicorn, which stops and has waited long enough; nothing else waits for the end.
            if not started:
                await ErrorResponse(server_stopping())(scope, receive, send)
        except Exception as error:
            log_fault("request failed", error)
            if not started:
                await ErrorResponse(internal_error())(scope, receive, send)
