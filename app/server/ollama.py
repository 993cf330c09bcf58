"""Ollama's dialect under `/api`; docs/rest/ollama.md says what it honours.

| Route | |
|---|---|
| GET, HEAD / | "Ollama is running"; our own name is in the header `server` |
| GET, HEAD /api/version | a version of Ollama, `OLLAMA_VERSION` |
| GET, HEAD /api/tags, GET /api/ps, POST /api/show | `app.server.ollama_models` |
| POST /api/chat, POST /api/generate | `app.server.ollama_answers` |
| POST /api/embed, POST /api/embeddings | `app.server.ollama_embeddings` |
| POST /api/create, pull, push, copy, blobs; DELETE /api/delete | 403, naming the command |

A name may end in `:latest` and differ in case, as Ollama's may; answers repeat it as it was sent.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import model_validator
from starlette.responses import PlainTextResponse, Response

from app.engine.abilities import Abilities, AbilityFinder
from app.engine.conversation import Message
from app.engine.protocol import EngineStatus, Failed, GenerationRequest
from app.errors import GryphonError
from app.library.installed import InstalledModel
from app.server.errors import ApiError
from app.server.generation import Backend, GenerationResponse, client_of
from app.server.ollama_answers import ChatAnswer, GenerateAnswer, conversation_of, encoded
from app.server.ollama_models import ModelPages, installed_as
from app.server.ollama_requests import AnswerFields, ChatFields, GenerateFields, ModelFields, Name
from app.server.thinking import thinking_options
from app.server.validation import Fields, body_of

OLLAMA_VERSION = "0.33.0"
"""The Ollama whose routes these are. Clients compare it: Copilot wants 0.6.4 or later, Codex 0.13.4
or later (or 0.0.0, a build of Ollama's developers)."""

_STATUS_TIMEOUT_S = 2.0

_FORBIDDEN = (
    ("POST", "/pull", "Models are fetched with `gryphon pull NAME`"),
    ("DELETE", "/delete", "Models are removed with `gryphon rm NAME`"),
    ("POST", "/create", "Models are fetched and converted with `gryphon pull NAME`"),
    ("POST", "/copy", "Models have the names that `gryphon list` shows, and no others"),
    ("POST", "/push", "Gryphon uploads nothing; `gryphon list` shows what is here"),
    ("POST", "/blobs/{digest}", "Models are fetched with `gryphon pull NAME`"),
    ("HEAD", "/blobs/{digest}", "Models are fetched with `gryphon pull NAME`"),
)


class ShowFields(Fields):
    """Body of `POST /api/show`; `name` is the older word for `model`."""

    without_effect = frozenset({"verbose", "options", "name"})
    only_neutral = {"system": ("",), "template": ("",)}

    model: Name

    @model_validator(mode="before")
    @classmethod
    def _by_its_older_word(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("model") and "name" in data:
            return data | {"model": data["name"]}
        return data


class _Json(Response):
    """A body as Ollama writes JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else encoded(content)


class Ollama:
    """What the routes answer from."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pages = ModelPages()
        self.abilities = AbilityFinder()

    async def find(self, name: str) -> InstalledModel:
        """The installed model that a client means.

        Raises:
            ApiError: 404, there is none.
            GryphonError: "invalid_model", it is damaged.
        """
        found = installed_as(name, await self.backend.installed_models())
        if found is not None:
            return found
        try:
            return await self.backend.find_model(name)
        except GryphonError as error:
            if error.code not in ("model_not_found", "no_model_installed"):
                raise
            # Clients look for the first four words.
            message = f"model '{name[:100]}' not found. {error.message}"
            raise ApiError(404, "model_not_found", message) from error

    async def status(self) -> EngineStatus | None:
        """None where no engine runs or answers."""
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await self.backend.engine.status()
        except (TimeoutError, GryphonError):
            return None

    async def options_of(self, fields: AnswerFields, model: InstalledModel) -> dict[str, Any]:
        """Template options for `think`.

        Raises:
            ApiError: 400, the model cannot do as it says.
        """
        if fields.think is None:
            return {}
        abilities = await self.abilities.of(model.ref, model.modified)
        if fields.think and not abilities.thinks:
            message = f'"{fields.model}" does not support thinking; leave `think` out.'
            raise ApiError(400, "unsupported_value", message, param="think")
        effort = fields.think if isinstance(fields.think, str) else None
        think = bool(fields.think)
        return thinking_options(abilities, think=think, effort=effort, field="think")

    async def check_context(self, fields: ModelFields, model: InstalledModel) -> None:
        """Refuse a `num_ctx` that the model does not have here.

        Raises:
            ApiError: 400.
        """
        wanted = fields.given_options.num_ctx
        if wanted is None:
            return
        lengths = [model.context_length]
        status = await self.status()
        if status is not None and status.model == model.ref:
            lengths.append(status.context_length)
        most = min((length for length in lengths if length is not None), default=wanted)
        if wanted > most:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"`num_ctx` = {wanted} is more than the {most} tokens that {model.name} has here; "
                "lower it or leave it out.",
                param="options.num_ctx",
            )

    async def loaded(self, fields: ModelFields, model: InstalledModel) -> str:
        """Load the model, or unload it where `keep_alive` is 0; what was done, in Ollama's word.

        Raises:
            ApiError: it cannot be loaded.
        """
        is_unload = fields.keep_alive == 0
        if is_unload:
            status = await self.status()
            if status is None or status.model != model.ref:
                return "unload"
        await self.backend.engine.start()
        events = self.backend.engine.load(model.ref, keep_alive_s=fields.keep_alive)
        async for event in events:
            if isinstance(event, Failed):
                raise ApiError.of(event)
        return "unload" if is_unload else "load"

    async def answer(
        self,
        request: Request,
        fields: AnswerFields,
        model: InstalledModel,
        answer: ChatAnswer | GenerateAnswer,
        **asked: Any,
    ) -> Response:
        """Generate what is asked: fields of `GenerationRequest` besides those of every request."""
        await self.check_context(fields, model)
        options = fields.given_options
        generation = GenerationRequest(
            id=f"ollama-{uuid.uuid4().hex}",
            model=model.ref,
            sampling=options.sampling,
            max_tokens=options.max_tokens,
            stop=options.stop or [],
            logprobs=bool(fields.logprobs),
            top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else 0,
            constraint=fields.format,
            keep_alive_s=fields.keep_alive,
            client=client_of(request),
            **asked,
        )
        return GenerationResponse(self.backend, [generation], answer, stream=fields.streams)


def router(backend: Backend) -> APIRouter:
    """`/` and the routes under `/api`."""
    routes = APIRouter(tags=["Ollama"])
    ollama = Ollama(backend)

    @routes.head("/", include_in_schema=False)
    @routes.get("/", response_class=PlainTextResponse)
    async def root() -> Response:
        """What clients of Ollama look for to know that it runs."""
        return PlainTextResponse("Ollama is running", headers={"server": "gryphon"})

    @routes.head("/api/version", include_in_schema=False)
    @routes.get("/api/version")
    async def version() -> Response:
        """The Ollama whose routes these are."""
        return _Json({"version": OLLAMA_VERSION})

    @routes.head("/api/tags", include_in_schema=False)
    @routes.get("/api/tags")
    async def tags() -> Response:
        """Installed models."""
        models = await backend.installed_models()
        return _Json(await asyncio.to_thread(ollama.pages.listed, models))

    @routes.get("/api/ps")
    async def ps() -> Response:
        """The model in memory."""
        models, status = await backend.installed_models(), await ollama.status()
        return _Json(await asyncio.to_thread(ollama.pages.running, status, models))

    @routes.post("/api/show", openapi_extra=body_of(ShowFields))
    async def show(request: Request) -> Response:
        """What one model is and can do."""
        fields = ShowFields.parse(await request.body())
        model = await ollama.find(fields.model)
        try:
            abilities = await ollama.abilities.of(model.ref, model.modified)
        except GryphonError:  # a broken template: it still completes
            abilities = Abilities()
        return _Json(await asyncio.to_thread(ollama.pages.shown, model, abilities))

    @routes.post("/api/chat", openapi_extra=body_of(ChatFields))
    async def chat(request: Request) -> Response:
        """Answer a conversation through the model's own chat template."""
        fields = ChatFields.parse(await request.body())
        model = await ollama.find(fields.model)
        answer = ChatAnswer(fields.model)
        if not fields.messages:
            return _Json(answer.without_words(await ollama.loaded(fields, model)))
        return await ollama.answer(
            request,
            fields,
            model,
            answer,
            messages=fields.conversation,
            tools=[tool.for_engine for tool in fields.tools],
            template_options=await ollama.options_of(fields, model),
        )

    @routes.post("/api/generate", openapi_extra=body_of(GenerateFields))
    async def generate(request: Request) -> Response:
        """Answer one prompt, or continue it as it is."""
        fields = GenerateFields.parse(await request.body())
        model = await ollama.find(fields.model)
        if not fields.prompt and not fields.suffix:
            words = GenerateAnswer(fields.model)
            return _Json(words.without_words(await ollama.loaded(fields, model)))
        if fields.raw or fields.suffix:
            return await ollama.answer(
                request,
                fields,
                model,
                GenerateAnswer(fields.model),
                prompt=fields.prompt,
                suffix=fields.suffix,
            )
        conversation = _conversation(fields)
        return await ollama.answer(
            request,
            fields,
            model,
            GenerateAnswer(fields.model, conversation),
            messages=conversation,
            template_options=await ollama.options_of(fields, model),
        )

    for method, path, what in _FORBIDDEN:
        _forbid(routes, method, f"/api{path}", what)
    return routes


def _conversation(fields: GenerateFields) -> list[Message]:
    """What the prompt continues, with the prompt; a `system` takes the place of an earlier one."""
    earlier = conversation_of(fields.context) if fields.context else []
    if fields.system:
        rest = [message for message in earlier if message.role != "system"]
        earlier = [Message("system", fields.system), *rest]
    return [*earlier, Message("user", fields.prompt)]


def _forbid(routes: APIRouter, method: str, path: str, what: str) -> None:
    """A route that changes models: never over the network, where any program could."""

    async def refuse() -> Response:
        message = f"This endpoint does not change which models there are. {what}."
        raise ApiError(403, "forbidden", message)

    name = f"{method.lower()}{path.partition('{')[0]}".replace("/", "_").rstrip("_")
    parameters = [
        {"name": part, "in": "path", "required": True, "schema": {"type": "string"}}
        for part in re.findall(r"{(\w+)}", path)
    ]
    routes.add_api_route(
        path,
        refuse,
        methods=[method],
        name=name,
        operation_id=name,
        include_in_schema=method != "HEAD",
        openapi_extra={"parameters": parameters} if parameters else None,
    )
