"""OpenAI's dialect: models, chat completions, completions. Fields: `app.server.openai_requests`.

A stream that fails midway ends with a frame `data: {"error": …}` and no `[DONE]`: the openai
client raises at the former, and a client that only looks for the latter must not take a broken
answer for a whole one.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from app import __version__
from app.engine.protocol import Finished, GenerationRequest, Message, Token, TokenLogprob, Usage
from app.library.installed import InstalledModel
from app.server.errors import ApiError, JsonResponse
from app.server.generation import Backend, GenerationResponse
from app.server.openai_requests import ChatFields, CompletionFields
from app.server.validation import Fields, schema_of

_DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0

# Legal inside JSON and SSE, but Python clients that split with str.splitlines break at them.
_LINE_ENDS = {
    "\u0085".encode(): b"\\u0085",
    "\u2028".encode(): b"\\u2028",
    "\u2029".encode(): b"\\u2029",
}


def frame(data: Any) -> bytes:
    """`data` as one server-sent event."""
    encoded = msgspec.json.encode(data)
    for character, escaped in _LINE_ENDS.items():
        encoded = encoded.replace(character, escaped)
    return b"data: " + encoded + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class _OpenAIAnswer:
    """What the two routes' answers share. Subclasses name the objects and fill the choices."""

    stream_media_type = "text/event-stream"
    keep_alive = b": keep-alive\n\n"
    stream_object: str
    whole_object: str

    def __init__(self, request_id: str, model: str, *, with_usage: bool = False) -> None:
        self.with_usage = with_usage
        self.head: dict[str, Any] = {
            "id": request_id,
            "object": "",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"gryphon-{__version__}",
        }

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = self.head | {"object": self.stream_object, "choices": [choice]}
        if self.with_usage:
            chunk["usage"] = None
        return frame(chunk)

    def _choice(self, text: str | None, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """One streamed choice; `text` is None in the last one."""
        raise NotImplementedError

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        """Logprobs of consecutive tokens, None when they were not asked for."""
        raise NotImplementedError

    def _thought(self, reasoning: str) -> bytes:
        """A streamed piece of reasoning; empty when there is none."""
        return b""

    def token(self, token: Token) -> bytes:
        logprobs = self._logprobs([token])
        thought = self._thought(token.reasoning)
        if not token.text and logprobs is None:
            return thought
        return thought + self._chunk(self._choice(token.text, logprobs, None))

    def closing(self, finished: Finished) -> bytes:
        last = self._thought(finished.reasoning)
        last += self._chunk(self._choice(finished.text, None, None)) if finished.text else b""
        last += self._chunk(self._choice(None, None, finished.reason))
        if self.with_usage:
            usage = {"choices": [], "usage": _usage(finished.usage)}
            last += frame(self.head | {"object": self.stream_object} | usage)
        return last + _DONE

    def broken(self, error: ApiError) -> bytes:
        return frame(error.body())

    def _whole(self, finished: Finished, choice: dict[str, Any]) -> bytes:
        choice |= {"index": 0, "finish_reason": finished.reason}
        rest = {"choices": [choice], "usage": _usage(finished.usage)}
        return msgspec.json.encode(self.head | {"object": self.whole_object} | rest)


class ChatAnswer(_OpenAIAnswer):
    """Answers of `/v1/chat/completions`."""

    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _choice(self, text: str | None, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        content = [
            _spelled(token.logprob) | {"top_logprobs": [_spelled(other) for other in token.top]}
            for token in tokens
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def _thought(self, reasoning: str) -> bytes:
        # OpenAI keeps reasoning to itself; clients know this name from DeepSeek's API.
        choice = self._choice(None, None, None) | {"delta": {"reasoning_content": reasoning}}
        return self._chunk(choice) if reasoning else b""

    def opening(self) -> bytes:
        choice = self._choice("", None, None)
        choice["delta"] = {"role": "assistant", "content": ""}
        return self._chunk(choice)

    def whole(self, tokens: list[Token], finished: Finished) -> bytes:
        text = "".join(token.text for token in tokens) + finished.text
        message = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(token.reasoning for token in tokens) + finished.reasoning:
            message["reasoning_content"] = reasoning
        return self._whole(finished, {"message": message, "logprobs": self._logprobs(tokens)})


class CompletionAnswer(_OpenAIAnswer):
    """Answers of `/v1/completions`."""

    stream_object = whole_object = "text_completion"

    def __init__(
        self, request_id: str, model: str, *, with_usage: bool = False, alternatives: int = 0
    ) -> None:
        super().__init__(request_id, model, with_usage=with_usage)
        self.alternatives = alternatives
        self.offset = 0

    def _choice(self, text: str | None, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text or "",
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        names: list[str] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for token in tokens:
            # Where the text so far ends: exact unless text waits for a character or a stop
            # string to be decided, then the place it waits at.
            offsets.append(self.offset)
            self.offset += len(token.text)
            if token.logprob is not None:
                names.append(_name(token.logprob))
                values.append(_finite(token.logprob.logprob))
                # Two ids may spell the same text; the likelier one keeps the key.
                tops.append({_name(one): _finite(one.logprob) for one in reversed(token.top)})
        if not names:
            return None
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": tops if self.alternatives else None,
            "text_offset": offsets,
        }

    def opening(self) -> bytes:
        return b""

    def whole(self, tokens: list[Token], finished: Finished) -> bytes:
        text = "".join(token.text for token in tokens) + finished.text
        return self._whole(finished, {"text": text, "logprobs": self._logprobs(tokens)})


def _finite(logprob: float) -> float:
    # OpenAI's stand-in for minus infinity, which JSON has no word for.
    return max(logprob, _LEAST_LOGPROB)


def _spelled(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.raw)}


def _name(one: TokenLogprob) -> str:
    """The token's text; `bytes:\\xe2\\x80`, as OpenAI writes it, when it is part of a character."""
    try:
        return one.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)


def _model_object(model: InstalledModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified),
        "owned_by": "gryphon",
        "context_length": model.context_length,
        "family": model.family,
        "quantization": model.quantization,
    }


def _body_of(fields: type[Fields]) -> dict[str, Any]:
    """OpenAPI's description of a body that the handler reads itself."""
    content = {"application/json": {"schema": schema_of(fields)}}
    return {"requestBody": {"required": True, "content": content}}


def router(backend: Backend) -> APIRouter:
    """The routes under `/v1`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def list_models() -> Response:
        """Installed models."""
        models = await backend.installed_models()
        return JsonResponse({"object": "list", "data": [_model_object(one) for one in models]})

    @routes.get("/models/{name:path}")
    async def show_model(name: str) -> Response:
        """One installed model; names may hold slashes."""
        return JsonResponse(_model_object(await backend.find_model(name)))

    @routes.post("/chat/completions", openapi_extra=_body_of(ChatFields))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation through the model's own chat template."""
        fields = ChatFields.parse(await request.body())
        model = await backend.find_model(fields.model)
        generation = GenerationRequest(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            model=model.ref,
            messages=[
                Message(one.role, one.content, one.reasoning_content or "")
                for one in fields.messages
            ],
            sampling=fields.sampling,
            max_tokens=fields.token_limit,
            stop=fields.stop or [],
            logprobs=bool(fields.logprobs),
            top_logprobs=fields.top_logprobs or 0,
        )
        answer = ChatAnswer(generation.id, model.name, with_usage=fields.with_usage)
        return GenerationResponse(backend, generation, answer, stream=bool(fields.stream))

    @routes.post("/completions", openapi_extra=_body_of(CompletionFields))
    async def completions(request: Request) -> Response:
        """Continue a raw prompt, verbatim: no template."""
        fields = CompletionFields.parse(await request.body())
        model = await backend.find_model(fields.model)
        generation = GenerationRequest(
            id=f"cmpl-{uuid.uuid4().hex}",
            model=model.ref,
            prompt=fields.prompt if isinstance(fields.prompt, str) else None,
            prompt_tokens=fields.prompt if isinstance(fields.prompt, list) else None,
            sampling=fields.sampling,
            max_tokens=fields.max_tokens,
            stop=fields.stop or [],
            logprobs=fields.logprobs is not None,
            top_logprobs=fields.logprobs or 0,
        )
        answer = CompletionAnswer(
            generation.id,
            model.name,
            with_usage=fields.with_usage,
            alternatives=generation.top_logprobs,
        )
        return GenerationResponse(backend, generation, answer, stream=bool(fields.stream))

    return routes
