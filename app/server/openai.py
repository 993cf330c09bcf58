"""OpenAI's dialect: the routes of models, chat completions and completions.

What they honour, accept and refuse: docs/rest/openai.md.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.library.installed import InstalledModel
from app.server.chat_answer import ChatAnswer
from app.server.chat_requests import ChatFields
from app.server.completion_answer import CompletionAnswer
from app.server.completion_requests import CompletionFields
from app.server.errors import JsonResponse
from app.server.generation import Backend, GenerationResponse, client_of
from app.server.openai_requests import check_copies
from app.server.reasoning_effort import effort_options
from app.server.validation import body_of


def _model_object(model: InstalledModel, context_length: int | None) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified),
        "owned_by": "gryphon",
        "context_length": context_length,
        "family": model.family,
        "quantization": model.quantization,
    }


async def _described(backend: Backend, models: list[InstalledModel]) -> list[dict[str, Any]]:
    """Model objects. The context length is the model's own, or for the one in memory what there is
    room for."""
    status = await backend.status()
    resident, room = (status.model, status.context_length) if status else (None, None)
    return [
        _model_object(model, room if room and model.ref == resident else model.context_length)
        for model in models
    ]


def router(backend: Backend) -> APIRouter:
    """The routes under `/v1`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def list_models() -> Response:
        """Installed models."""
        models = await backend.installed_models()
        return JsonResponse({"object": "list", "data": await _described(backend, models)})

    @routes.get("/models/{name:path}")
    async def show_model(name: str) -> Response:
        """One installed model; names may hold slashes."""
        (described,) = await _described(backend, [await backend.find_model(name)])
        return JsonResponse(described)

    @routes.post("/chat/completions", openapi_extra=body_of(ChatFields))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation through the model's own chat template."""
        body = await request.body()
        fields = ChatFields.parse(body)
        check_copies(body, fields.n or 1)
        model = await backend.find_model(fields.model)
        options = await asyncio.to_thread(
            effort_options, fields.reasoning_effort, model.path, param="reasoning_effort"
        )
        id = f"chatcmpl-{uuid.uuid4().hex}"
        requests = fields.requests(id, model.ref, client_of(request), options)
        answer = ChatAnswer(
            id,
            model.name,
            choices=len(requests),
            one_call=fields.parallel_tool_calls is False,
            with_usage=fields.with_usage,
        )
        return GenerationResponse(backend, requests, answer, stream=bool(fields.stream))

    @routes.post("/completions", openapi_extra=body_of(CompletionFields))
    async def completions(request: Request) -> Response:
        """Continue raw prompts, verbatim: no template."""
        body = await request.body()
        fields = CompletionFields.parse(body)
        check_copies(body, fields.n or 1)
        model = await backend.find_model(fields.model)
        id = f"cmpl-{uuid.uuid4().hex}"
        requests = fields.requests(id, model.ref, client_of(request))
        answer = CompletionAnswer(
            id,
            model.name,
            choices=len(requests),
            per_prompt=fields.n or 1,
            alternatives=fields.logprobs or 0,
            echo=fields.echoed,
            with_usage=fields.with_usage,
        )
        return GenerationResponse(backend, requests, answer, stream=bool(fields.stream))

    return routes
