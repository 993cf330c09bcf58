"""The FastAPI application: guards, errors, the routes of our own and the dialects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from app import __version__
from app.errors import GryphonError
from app.library import installed
from app.server import (
    anthropic,
    docs,
    embeddings,
    llama_cpp,
    metrics,
    ollama,
    ollama_embeddings,
    openai,
    openapi,
    responses,
    security,
)
from app.server.errors import ApiError, CatchFaults, ErrorResponse, JsonResponse, log_fault
from app.server.generation import Backend, Ending, Engine, Models

KEEP_ALIVE_S = 10.0
_HEALTH_TIMEOUT_S = 0.25


def create_app(
    engine: Engine,
    *,
    models: Models = installed,
    ending: Ending | None = None,
    allow_hosts: Iterable[str] = (),
    allow_ip_hosts: bool = False,
    allow_origins: Iterable[str] = (),
    api_key: str | None = None,
    at_path: bool = False,
    is_full: Callable[[], bool] = lambda: False,
    body_timeout_s: float = security.BODY_TIMEOUT_S,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> FastAPI:
    """The endpoint over `engine`, which is started by the first generation and never closed here.

    Args:
        engine: Used from the event loop that serves the application.
        models: Looks installed models up, in threads.
        ending: Told when running answers should end.
        keep_alive_s: Silence after which a stream carries a comment.

    The other arguments are those of `security.guards`.
    """
    app = FastAPI(
        title="Gryphon",
        version=__version__,
        # FastAPI's pages load their scripts from a CDN.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(CatchFaults),
            *security.guards(
                allow_hosts=allow_hosts,
                allow_ip_hosts=allow_ip_hosts,
                allow_origins=allow_origins,
                api_key=api_key,
                public=docs.PATHS,
                at_path=at_path,
                is_full=is_full,
                body_timeout_s=body_timeout_s,
            ),
        ],
    )
    app.add_exception_handler(GryphonError, _expected_error)
    app.add_exception_handler(HTTPException, _no_such_route)

    @app.get("/health", tags=["Gryphon"])
    async def health() -> Response:
        """Whether the endpoint lives and what its engine does; never waits for the engine."""
        state, model = await _engine_state(engine)
        return JsonResponse({"status": "ok", "engine": state, "model": model})

    app.include_router(metrics.router(engine))
    app.include_router(docs.router())
    backend = Backend(engine, models, keep_alive_s, ending or Ending())
    for dialect in (anthropic, openai, responses, embeddings, llama_cpp, ollama, ollama_embeddings):
        app.include_router(dialect.router(backend))
    openapi.complete(app, has_key=api_key is not None)
    return app


async def _engine_state(engine: Engine) -> tuple[str, str | None]:
    """unloaded, loading, ready, stopped or unresponsive; and the resident model's name."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            status = await engine.status()
    except TimeoutError:
        return "unresponsive", None
    except GryphonError:
        return "stopped", None
    except Exception as error:
        log_fault("engine status failed", error)
        return "unresponsive", None
    if status is None:
        return "stopped", None
    return status.state, status.model.name if status.model else None


async def _expected_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, GryphonError)
    return ErrorResponse(error)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = "There is no such route here; GET /openapi.json lists them."
    elif error.status_code == 405:
        message = f"This route does not answer {request.method}; GET /openapi.json lists what does."
    else:
        message = f"{HTTPStatus(error.status_code).phrase}."
    code = HTTPStatus(error.status_code).name.lower()
    answer = ApiError(error.status_code, code, message)
    return ErrorResponse(answer, dict(error.headers or {}))
