"""Ollama's embeddings: `POST /api/embed`, and `POST /api/embeddings` as it was before.

| Field | embed | embeddings |
|---|---|---|
| model, keep_alive | honoured | honoured |
| input: a text or a list of them; none: load the model | honoured | unknown |
| prompt: one text; none: load the model | unknown | honoured |
| dimensions: the first so many numbers, made length 1 again | honoured | unknown |
| options | as in chat; only `num_ctx` can refuse | as embed |
| truncate | no effect: an input that is too long is refused, never cut | unknown |
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.responses import Response

from app.engine.embed_request import MAX_INPUTS
from app.engine.protocol import Embed, Embedded
from app.server.computed import ComputedResponse
from app.server.embeddings import each_vector, numbers_of
from app.server.errors import ApiError
from app.server.generation import Backend, client_of
from app.server.ollama import Ollama
from app.server.ollama_requests import ModelFields, Text
from app.server.validation import body_of

_MAX_INT = 2**31 - 1


def _inputs(value: Any) -> Any:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else value


class EmbedFields(ModelFields):
    """Body of `POST /api/embed`."""

    without_effect = frozenset({"truncate"})

    input: Annotated[
        list[str],
        Field(max_length=MAX_INPUTS, fail_fast=True),
        BeforeValidator(_inputs),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        ),
    ] = []
    dimensions: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None


class EmbeddingsFields(ModelFields):
    """Body of `POST /api/embeddings`."""

    prompt: Text = ""


def router(backend: Backend) -> APIRouter:
    """The two routes."""
    routes = APIRouter(prefix="/api", tags=["Ollama"])
    ollama = Ollama(backend)

    async def embedded(request: Request, fields: ModelFields, texts: list[str]) -> Embedded | None:
        """The vectors; None where there is nothing to embed and the model was loaded."""
        model = await ollama.find(fields.model)
        await ollama.check_context(fields, model)
        if not texts:
            await ollama.loaded(fields, model)
            return None
        return await backend.engine.embed(
            Embed(
                id=f"ollama-{uuid.uuid4().hex}",
                model=model.ref,
                texts=texts,
                client=client_of(request),
                keep_alive_s=fields.keep_alive,
            )
        )

    @routes.post("/embed", openapi_extra=body_of(EmbedFields))
    async def embed(request: Request) -> Response:
        """Vectors of texts: means of the model's final hidden states, of length 1."""
        fields = EmbedFields.parse(await request.body())
        begun_s = time.monotonic()

        async def compute() -> dict[str, Any]:
            found = await embedded(request, fields, fields.input)
            if found is None:
                return {"model": fields.model, "embeddings": []}
            vectors = await asyncio.to_thread(_spelled, found, fields.dimensions or 0)
            return {
                "model": fields.model,
                "embeddings": vectors,
                "total_duration": round((time.monotonic() - begun_s) * 1e9),
                "prompt_eval_count": sum(found.prompt_tokens),
            }

        return ComputedResponse(compute)

    @routes.post("/embeddings", openapi_extra=body_of(EmbeddingsFields))
    async def embeddings(request: Request) -> Response:
        """The vector of one text, by the older route."""
        fields = EmbeddingsFields.parse(await request.body())

        async def compute() -> dict[str, Any]:
            found = await embedded(request, fields, [fields.prompt] if fields.prompt else [])
            if found is None:
                return {"embedding": []}
            (vector,) = await asyncio.to_thread(_spelled, found, 0)
            return {"embedding": vector}

        return ComputedResponse(compute)

    return routes


def _spelled(embedded: Embedded, dimensions: int) -> list[msgspec.Raw]:
    """Each vector as JSON: as Python's numbers, millions of them would take a gigabyte.

    Args:
        dimensions: The first so many numbers alone; 0 and more than there are is all.

    Raises:
        ApiError: 400, those are all zero.
    """
    spelled = []
    for vector in each_vector(embedded):
        numbers = numbers_of(vector)
        if 0 < dimensions < len(numbers):
            numbers = numbers[:dimensions]
            length = math.hypot(*numbers)
            if length == 0:
                raise ApiError(
                    400,
                    "invalid_value",
                    f"The first {dimensions} numbers of a vector are all 0: ask for more "
                    "`dimensions`, or leave the field out.",
                    param="dimensions",
                )
            numbers = [number / length for number in numbers]
        spelled.append(msgspec.Raw(msgspec.json.encode(numbers)))
    return spelled
