"""llama.cpp's routes, as llama.vim and llama.vscode use them. Fields:
`app.server.llama_cpp_requests`.

Its server has one model, so requests need not name any: without a name the resident model answers,
else the default one.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any, cast

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from app import __version__
from app.engine.protocol import Detokenize, GenerationRequest, Sampling, Tokenize
from app.library.chat_template import chat_template
from app.library.installed import InstalledModel
from app.server.computed import ComputedResponse
from app.server.errors import JsonResponse
from app.server.generation import Backend, Engine, GenerationResponse, client_of
from app.server.infill import EarlyEnd, InfillAnswer
from app.server.llama_cpp_requests import DetokenizeFields, InfillFields, TokenizeFields
from app.server.validation import body_of

# Rows that the engine decodes at once (`app.engine.scheduler.MAX_ROWS`, which is not for faces).
_SLOTS = 16


def _requests(fields: InfillFields, model: InstalledModel, client: str) -> list[GenerationRequest]:
    """One for each completion that is asked for; with a seed, each has one of its own."""
    name, sampling = f"infill-{uuid.uuid4().hex}", fields.sampling
    return [
        GenerationRequest(
            id=f"{name}-{index}",
            model=model.ref,
            prompt=fields.input_prefix,
            suffix=fields.input_suffix,
            infill=fields.infill,
            sampling=sampling
            if sampling.seed is None
            else msgspec.structs.replace(sampling, seed=_seed(sampling.seed, index)),
            # A prompt is read for the sake of a token: of 0 tokens, the one is not told.
            max_tokens=None if fields.n_predict < 0 else max(1, fields.n_predict),
            ignore_eos=fields.ignore_eos,
            stop=fields.stop or [],
            client=client,
        )
        for index in range(fields.n_cmpl)
    ]


def _seed(seed: int, index: int) -> int:
    return (seed + index) % 2**63


def _settings(
    model: InstalledModel, context_length: int | None, sampling: Sampling, most: int
) -> dict[str, Any]:
    """What is known of how an answer is made; what the request leaves to the model is not there."""
    given = {
        name: value
        for name, value in msgspec.structs.asdict(sampling).items()
        if value is not None and name not in ("logit_bias", "repetition_penalty")
    }
    if sampling.repetition_penalty is not None:
        given["repeat_penalty"] = sampling.repetition_penalty
    # llama.cpp has no word for no limit.
    return {"n_ctx": context_length or 0, "n_predict": most, "model": model.name} | given


async def _context_length(backend: Backend, model: InstalledModel) -> int | None:
    """What there is room for where the model is in memory, else what it can read."""
    status = await backend.status()
    if status is not None and status.model == model.ref and status.state == "ready":
        return status.context_length
    return model.context_length


def router(backend: Backend) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["llama.cpp"])

    @routes.post("/infill", openapi_extra=body_of(InfillFields))
    async def infill(request: Request) -> Response:
        """Fill the gap between a prefix and a suffix, with the model's own tokens for that."""
        fields = InfillFields.parse(await request.body())
        model = await backend.model_of(fields.model)
        context_length = await _context_length(backend, model)
        answer = InfillAnswer(
            model.name,
            settings=_settings(model, context_length, fields.sampling, fields.n_predict),
            fields=fields.response_fields,
            with_tokens=fields.return_tokens,
            has_stop=bool(fields.stop),
            choices=fields.n_cmpl,
        )
        ending = EarlyEnd(
            backend.engine,
            indent=fields.n_indent,
            seconds=fields.t_max_predict_ms / 1000,
            has_text=fields.n_predict != 0,
        )
        filling = replace(backend, engine=cast(Engine, ending))
        requests = _requests(fields, model, client_of(request))
        return GenerationResponse(filling, requests, answer, stream=fields.stream)

    @routes.get("/props")
    async def props(model: str | None = None) -> Response:
        """What clients read of a model and of this server; `model` names another than the
        resident one."""
        chosen = await backend.model_of(model)
        context_length = await _context_length(backend, chosen)
        template = await asyncio.to_thread(chat_template, chosen.path)
        settings = _settings(chosen, context_length, Sampling(), -1)
        return JsonResponse(
            {
                "default_generation_settings": {
                    "id": 0,
                    "n_ctx": settings["n_ctx"],
                    "is_processing": False,
                    "params": settings,
                },
                "total_slots": _SLOTS,
                "model_alias": chosen.name,
                "model_path": str(chosen.path),
                "chat_template": template,
                "modalities": {"vision": False, "audio": False},
                "build_info": f"gryphon-{__version__}",
                "is_sleeping": False,
            }
        )

    @routes.post("/tokenize", openapi_extra=body_of(TokenizeFields))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, with their pieces if asked."""
        fields = TokenizeFields.parse(await request.body())
        model = await backend.model_of(fields.model)
        command = Tokenize(
            id=f"tokenize-{uuid.uuid4().hex}",
            model=model.ref,
            text=fields.content,
            add_special=fields.add_special,
            parse_special=fields.parse_special,
            with_pieces=fields.with_pieces,
            client=client_of(request),
        )

        async def compute() -> dict[str, Any]:
            answer = await backend.engine.tokenize(command)
            if answer.pieces is None:
                return {"tokens": answer.tokens}
            pairs = zip(answer.tokens, answer.pieces, strict=True)
            return {"tokens": [{"id": id, "piece": _piece(piece)} for id, piece in pairs]}

        return ComputedResponse(compute)

    @routes.post("/detokenize", openapi_extra=body_of(DetokenizeFields))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens spelled."""
        fields = DetokenizeFields.parse(await request.body())
        model = await backend.model_of(fields.model)
        command = Detokenize(
            id=f"detokenize-{uuid.uuid4().hex}",
            model=model.ref,
            tokens=fields.tokens,
            with_special=True,
            client=client_of(request),
        )

        async def compute() -> dict[str, Any]:
            return {"content": (await backend.engine.detokenize(command)).text}

        return ComputedResponse(compute)

    return routes


def _piece(piece: bytes) -> str | list[int]:
    """Its text, or its bytes where they are only part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
