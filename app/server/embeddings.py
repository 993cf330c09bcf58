"""OpenAI's embeddings: `POST /v1/embeddings`.

Any installed model makes them: the mean of its final hidden states over all tokens of an input,
scaled to length 1. Models that were trained to be read otherwise take `pooling: "last"`.

| Field | |
|---|---|
| model, input (text, list of texts, token ids, list of those; 2048 at most) | honoured |
| encoding_format (float, base64: little-endian float32) | honoured |
| pooling (mean, last; not OpenAI's) | honoured |
| dimensions | refused unless it is what the model has |
| user | no effect |
| anything else | unknown, refused |
"""

from __future__ import annotations

import asyncio
import base64
import struct
import uuid
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field, PlainValidator, WithJsonSchema
from starlette.responses import Response

from app.engine.embed_request import MAX_INPUTS
from app.engine.protocol import Embed, Embedded
from app.server.computed import ComputedResponse
from app.server.errors import ApiError
from app.server.generation import Backend, client_of
from app.server.validation import Fields, body_of, refuse, shown

_MAX_INT = 2**31 - 1
Inputs = list[str] | list[list[int]]


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(id) is int and 0 <= id <= _MAX_INT for id in value)
    )


def _inputs(value: Any) -> Inputs:
    """One list of texts, or of lists of token ids."""
    several: list[Any] = [value] if isinstance(value, str) or _is_tokens(value) else value
    if isinstance(several, list) and 0 < len(several) <= MAX_INPUTS:
        if all(isinstance(one, str) and one for one in several):
            return several
        if all(map(_is_tokens, several)):
            return several
    if isinstance(several, list) and len(several) > MAX_INPUTS:
        raise refuse("invalid_value", f"{{path}} may hold {MAX_INPUTS} at most, got {len(several)}")
    raise refuse(
        "invalid_value",
        "{path} should be a text that is not empty, token ids, or a list of either, got {value}",
        value=shown(value),
    )


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_LISTS = [
    {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": one} for one in (_TEXT, _IDS)
]


class EmbeddingFields(Fields):
    """Body of `POST /v1/embeddings`."""

    without_effect = frozenset({"user"})

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[
        Any, PlainValidator(_inputs), WithJsonSchema({"anyOf": [_TEXT, _IDS, *_LISTS]})
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    pooling: Literal["mean", "last"] | None = None


def each_vector(embedded: Embedded) -> list[bytes]:
    """Each input's vector, little-endian float32."""
    size, vectors = 4 * embedded.dimensions, embedded.vectors
    return [vectors[begin : begin + size] for begin in range(0, len(vectors), size)]


def numbers_of(vector: bytes) -> list[float]:
    """The numbers of a vector."""
    return [number for (number,) in struct.iter_unpack("<f", vector)]


def _answer(fields: EmbeddingFields, model: str, embedded: Embedded) -> dict[str, Any]:
    if fields.dimensions not in (None, embedded.dimensions):
        raise ApiError(
            400,
            "unsupported_value",
            f"`dimensions` = {fields.dimensions} is not supported: {model} makes vectors of "
            f"{embedded.dimensions} numbers; leave the field out.",
            param="dimensions",
        )
    is_packed = fields.encoding_format == "base64"
    # Each is JSON by itself: millions of numbers, held as Python's, would take a gigabyte.
    spelled = [
        base64.b64encode(vector).decode()
        if is_packed
        else msgspec.Raw(msgspec.json.encode(numbers_of(vector)))
        for vector in each_vector(embedded)
    ]
    total = sum(embedded.prompt_tokens)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": one}
            for index, one in enumerate(spelled)
        ],
        "model": model,
        "usage": {"prompt_tokens": total, "total_tokens": total},
    }


def router(backend: Backend) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/embeddings", openapi_extra=body_of(EmbeddingFields))
    async def embeddings(request: Request) -> Response:
        """Vectors of texts: means of the model's final hidden states, of length 1."""
        fields = EmbeddingFields.parse(await request.body())
        model = await backend.find_model(fields.model)
        are_texts = isinstance(fields.input[0], str)
        embed = Embed(
            id=f"embd-{uuid.uuid4().hex}",
            model=model.ref,
            texts=fields.input if are_texts else None,
            tokens=None if are_texts else fields.input,
            pooling=fields.pooling or "mean",
            client=client_of(request),
        )

        async def compute() -> dict[str, Any]:
            embedded = await backend.engine.embed(embed)
            # Spelling many numbers takes seconds: not on the event loop.
            return await asyncio.to_thread(_answer, fields, model.name, embedded)

        return ComputedResponse(compute)

    return routes
