"""OpenAI's responses: the route."""

from __future__ import annotations

import asyncio
import uuid

from fastapi import APIRouter, Request
from pydantic_core import from_json
from starlette.responses import Response

from app.server.generation import Backend, GenerationResponse, client_of
from app.server.reasoning_effort import effort_options
from app.server.responses_answer import ResponsesAnswer
from app.server.responses_output import ResponseOutput
from app.server.responses_requests import ResponseFields
from app.server.validation import body_of


def router(backend: Backend) -> APIRouter:
    """The route under `/v1`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/responses", openapi_extra=body_of(ResponseFields))
    async def responses(request: Request) -> Response:
        """Answer a conversation given as items; nothing is stored."""
        body = await request.body()
        fields = ResponseFields.parse(body)
        model = await backend.find_model(fields.model)
        options = await asyncio.to_thread(
            effort_options,
            fields.reasoning.effort if fields.reasoning else None,
            model.path,
            param="reasoning.effort",
        )
        id = f"resp_{uuid.uuid4().hex}"
        generation = fields.request(id, model.ref, client_of(request), options)
        output = ResponseOutput(fields.names, one_call=fields.parallel_tool_calls is False)
        answer = ResponsesAnswer(id, model.name, fields.echo(from_json(body)), output)
        return GenerationResponse(backend, [generation], answer, stream=bool(fields.stream))

    return routes
