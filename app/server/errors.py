"""Errors as HTTP answers, in the shape OpenAI's clients read.

`{"error": {"message", "type", "param", "code"}}`: the checks in front of every dialect answer so
too. A message is one sentence for a person; a traceback goes to the log at most.
"""

from __future__ import annotations

import logging
import math
import traceback
from typing import Any

import msgspec
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

    def body(self) -> dict[str, Any]:
        """The JSON object that clients get."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def internal_error() -> ApiError:
    """What a client learns about a fault of ours."""
    return ApiError(500, "internal_error", "Internal error in Gryphon; its server log says more.")


def log_fault(where: str, error: BaseException) -> None:
    """Log an unexpected exception: its type and stack, not its text, which may quote a prompt."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", where, type(error).__qualname__, stack)


class JsonResponse(Response):
    """A JSON answer, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_response(error: GryphonError | Failed, headers: dict[str, str] | None = None) -> Response:
    """The whole answer for `error`, with Retry-After where trying again makes sense."""
    api_error = ApiError.of(error)
    headers = dict(headers or {})
    if api_error.status == 503:
        headers["retry-after"] = str(max(1, math.ceil(api_error.retry_after or 1)))
    return JsonResponse(api_error.body(), api_error.status, headers)


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
        except Exception as error:
            log_fault("request failed", error)
            if not started:
                await error_response(internal_error())(scope, receive, send)
