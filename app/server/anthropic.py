"""Anthropic's dialect: messages and the counting of their tokens.

docs/rest/anthropic.md says what it honours.

`GET /v1/models` is OpenAI's route too; requests with the header `anthropic-version` are answered
here, so this router comes before OpenAI's.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from app.engine.abilities import AbilityFinder
from app.engine.protocol import GenerationRequest, Tokenize
from app.library.installed import InstalledModel
from app.server.anthropic_answers import MessagesAnswer
from app.server.anthropic_models import model_object, models_page
from app.server.anthropic_requests import CountFields, MessagesFields, PromptFields
from app.server.computed import ComputedResponse
from app.server.errors import JsonResponse
from app.server.generation import Backend, GenerationResponse, client_of
from app.server.thinking import thinking_options
from app.server.validation import body_of


class _AskedInAnthropicsWay(APIRoute):
    """A route for requests with Anthropic's header alone; others find the next one of its path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if "anthropic-version" not in Headers(scope=scope):
            return Match.NONE, {}
        return super().matches(scope)


def router(backend: Backend) -> APIRouter:
    """The routes under `/v1/messages`."""
    routes = APIRouter(prefix="/v1", tags=["Anthropic"])
    listing = APIRouter(route_class=_AskedInAnthropicsWay, include_in_schema=False)
    finder = AbilityFinder()

    @listing.get("/models")
    async def list_models() -> Response:
        """Installed models."""
        return JsonResponse(models_page(await backend.installed_models()))

    @listing.get("/models/{name:path}")
    async def show_model(name: str) -> Response:
        """One installed model; names may hold slashes."""
        return JsonResponse(model_object(await backend.find_model(name)))

    async def template_options(fields: PromptFields, model: InstalledModel) -> dict[str, Any]:
        if fields.think is None and fields.effort is None:
            return {}
        abilities = await finder.of(model.ref, model.modified)
        return thinking_options(
            abilities, think=fields.think, effort=fields.effort, field="thinking"
        )

    @routes.post("/messages", openapi_extra=body_of(MessagesFields))
    async def messages(request: Request) -> Response:
        """Answer a conversation through the model's own chat template."""
        fields = MessagesFields.parse(await request.body())
        model = await backend.find_model(fields.model)
        generation = GenerationRequest(
            id=f"msg_{uuid.uuid4().hex}",
            model=model.ref,
            messages=fields.conversation,
            tools=fields.engine_tools,
            tool_choice=fields.engine_tool_choice,
            template_options=await template_options(fields, model),
            sampling=fields.sampling,
            max_tokens=fields.max_tokens,
            stop=fields.stop_sequences or [],
            constraint=fields.constraint,
            client=client_of(request),
        )
        answer = MessagesAnswer(
            generation.id,
            fields.model,
            one_call_only=fields.one_call_only,
            shows_thinking=fields.shows_thinking,
        )
        return GenerationResponse(backend, [generation], answer, stream=bool(fields.stream))

    @routes.post("/messages/count_tokens", openapi_extra=body_of(CountFields))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a message has, without an answer to it."""
        fields = CountFields.parse(await request.body())
        model = await backend.find_model(fields.model)
        command = Tokenize(
            id=f"count-{uuid.uuid4().hex}",
            model=model.ref,
            messages=fields.conversation,
            tools=[] if fields.engine_tool_choice == "none" else fields.engine_tools,
            template_options=await template_options(fields, model),
            client=client_of(request),
        )

        async def compute() -> dict[str, int]:
            return {"input_tokens": len((await backend.engine.tokenize(command)).tokens)}

        return ComputedResponse(compute)

    routes.include_router(listing)
    return routes
