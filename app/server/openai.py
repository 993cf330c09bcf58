"""OpenAI's dialect: models, chat completions, completions. Fields: `app.server.openai_requests`.

A stream that fails midway ends with a frame `data: {"error": …}` and no `[DONE]`: the openai
client raises at the former, and a client that only looks for the latter must not take a broken
answer for a whole one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from app import __version__
from app.engine.protocol import (
    Accepted,
    Finished,
    GenerationRequest,
    Message,
    Token,
    TokenLogprob,
    ToolCall,
    Usage,
)
from app.library.installed import InstalledModel
from app.server.errors import ApiError, JsonResponse, openai_body
from app.server.generation import Backend, Choice, GenerationResponse, client_of
from app.server.openai_requests import ChatFields, CompletionFields
from app.server.validation import body_of

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


def _usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """The usage of all choices, which share one prompt: it counts once, as OpenAI counts it."""
    prompt_tokens = usages[0].prompt_tokens
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
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

    def _choice(
        self, index: int, text: str | None, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        """One streamed choice; `text` is None in the last one."""
        raise NotImplementedError

    def _logprobs(self, tokens: list[Token], index: int) -> dict[str, Any] | None:
        """Logprobs of consecutive tokens of a choice, None when they were not asked for."""
        raise NotImplementedError

    def _thought(self, index: int, reasoning: str) -> bytes:
        """A streamed piece of reasoning; empty when there is none."""
        return b""

    def _call(self, index: int, call: ToolCall) -> bytes:
        """A streamed tool call."""
        raise NotImplementedError

    def opening(self, accepted: Accepted | None) -> bytes:
        return b""

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        if isinstance(event, ToolCall):
            return self._call(choice, event)
        logprobs = self._logprobs([event], choice)
        thought = self._thought(choice, event.reasoning)
        if not event.text and logprobs is None:
            return thought
        return thought + self._chunk(self._choice(choice, event.text, logprobs, None))

    def ended(self, finished: Finished, choice: int) -> bytes:
        last = self._thought(choice, finished.reasoning)
        if finished.text:
            last += self._chunk(self._choice(choice, finished.text, None, None))
        return last + self._chunk(self._choice(choice, None, None, finished.reason))

    def closing(self, ends: Sequence[Finished]) -> bytes:
        if not self.with_usage:
            return _DONE
        usage = {"choices": [], "usage": _usage([end.usage for end in ends])}
        return frame(self.head | {"object": self.stream_object} | usage) + _DONE

    def broken(self, error: ApiError) -> bytes:
        return frame(openai_body(error))

    def _whole_choice(self, choice: Choice, index: int) -> dict[str, Any]:
        """What a choice that was not streamed holds besides its index and finish_reason."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Choice]) -> bytes:
        spelled = [
            self._whole_choice(one, index) | {"index": index, "finish_reason": one.end.reason}
            for index, one in enumerate(choices)
        ]
        rest = {"choices": spelled, "usage": _usage([one.end.usage for one in choices])}
        return msgspec.json.encode(self.head | {"object": self.whole_object} | rest)


class ChatAnswer(_OpenAIAnswer):
    """Answers of `/v1/chat/completions`."""

    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self, request_id: str, model: str, *, with_usage: bool = False, choices: int = 1
    ) -> None:
        super().__init__(request_id, model, with_usage=with_usage)
        self.calls = [0] * choices
        """How many tool calls of each choice were sent."""

    def _choice(
        self, index: int, text: str | None, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[Token], index: int) -> dict[str, Any] | None:
        content = [
            _spelled(token.logprob) | {"top_logprobs": [_spelled(other) for other in token.top]}
            for token in tokens
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def _thought(self, index: int, reasoning: str) -> bytes:
        # OpenAI keeps reasoning to itself; clients know this name from DeepSeek's API.
        choice = self._choice(index, None, None, None) | {"delta": {"reasoning_content": reasoning}}
        return self._chunk(choice) if reasoning else b""

    def _call(self, index: int, call: ToolCall) -> bytes:
        place = self.calls[index]
        self.calls[index] += 1
        delta = {"tool_calls": [{"index": place} | _spelled_call(call)]}
        return self._chunk(self._choice(index, None, None, None) | {"delta": delta})

    def opening(self, accepted: Accepted | None) -> bytes:
        opened = b""
        for index in range(len(self.calls)):
            choice = self._choice(index, "", None, None)
            choice["delta"] = {"role": "assistant", "content": ""}
            opened += self._chunk(choice)
        return opened

    def _whole_choice(self, choice: Choice, index: int) -> dict[str, Any]:
        calls = [_spelled_call(call) for call in choice.tool_calls]
        # OpenAI's answers have no content where there are calls alone.
        text = choice.text or (None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message, "logprobs": self._logprobs(choice.tokens, index)}


class CompletionAnswer(_OpenAIAnswer):
    """Answers of `/v1/completions`."""

    stream_object = whole_object = "text_completion"

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        with_usage: bool = False,
        alternatives: int = 0,
        choices: int = 1,
    ) -> None:
        super().__init__(request_id, model, with_usage=with_usage)
        self.alternatives = alternatives
        self.offsets = [0] * choices
        """Characters of each choice's text so far."""

    def _choice(
        self, index: int, text: str | None, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text or "",
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[Token], index: int) -> dict[str, Any] | None:
        names: list[str] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for token in tokens:
            # Where the text so far ends: exact unless text waits for a character or a stop
            # string to be decided, then the place it waits at.
            offsets.append(self.offsets[index])
            self.offsets[index] += len(token.text)
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

    def _whole_choice(self, choice: Choice, index: int) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._logprobs(choice.tokens, index)}


def _finite(logprob: float) -> float:
    # OpenAI's stand-in for minus infinity, which JSON has no word for.
    return max(logprob, _LEAST_LOGPROB)


def _spelled(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.raw)}


def _spelled_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


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

    @routes.post("/chat/completions", openapi_extra=body_of(ChatFields))
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
            client=client_of(request),
        )
        answer = ChatAnswer(generation.id, model.name, with_usage=fields.with_usage)
        return GenerationResponse(backend, [generation], answer, stream=bool(fields.stream))

    @routes.post("/completions", openapi_extra=body_of(CompletionFields))
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
            client=client_of(request),
        )
        answer = CompletionAnswer(
            generation.id,
            model.name,
            with_usage=fields.with_usage,
            alternatives=generation.top_logprobs,
        )
        return GenerationResponse(backend, [generation], answer, stream=bool(fields.stream))

    return routes
