"""What OpenAI's chat and completions routes take, field by field.

| Field | Chat | Completions |
|---|---|---|
| model, temperature, top_p, seed, stop (≤ 16), stream, stream_options.include_usage | honoured | honoured |
| top_k, min_p (not OpenAI's) | honoured | honoured |
| messages (system, developer, user, assistant; text; the assistant's reasoning_content) | honoured | unknown |
| prompt (text or token ids, one) | unknown | honoured |
| max_tokens | honoured | honoured |
| max_completion_tokens | honoured | unknown |
| logprobs | bool, with top_logprobs 0..20 | 0..20 |
| user, store, metadata, service_tier, safety_identifier, prompt_cache_key, prompt_cache_retention | no effect | no effect |
| parallel_tool_calls, prediction; `name` and `cache_control` in messages | no effect | unknown |
| n = 1, penalties = 0, logit_bias = {} | neutral only | neutral only |
| tools, functions = []; tool_choice, function_call = none, auto; response_format = text; modalities = [text]; verbosity, reasoning_effort = medium; audio, web_search_options = null | neutral only | unknown |
| best_of = 1, echo = false, suffix = "" | unknown | neutral only |
| anything else | unknown | unknown |

"No effect" can change nothing here: there are no tools to call in parallel, no accounts, and prefix
reuse needs no key. "Neutral only" and "unknown" are refused with 400.
Without `temperature` and the like the model's own recommendation holds (`engine.protocol.Sampling`),
as in the other faces; without a token limit an answer may fill what is left of the context.
"""  # noqa: E501

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from app.engine.protocol import Sampling
from app.server.validation import Fields, refuse, shown

_WITHOUT_EFFECT = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
_ONLY_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
}

_MAX_INT = 2**31 - 1
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _role(role: str) -> str:
    if role in ("tool", "function"):
        raise refuse(
            "unsupported_value",
            "{path} = {value} is not supported: this endpoint does not offer tools yet",
            value=shown(role),
        )
    if role not in _ROLES:
        raise refuse(
            "invalid_value",
            "{path} should be system, developer, user or assistant, got {value}",
            value=shown(role),
        )
    return _ROLES[role]


def _joined_text(content: Any) -> Any:
    """Text parts joined as they are: a client that splits a text puts the spaces where it wants."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise refuse(
                "invalid_value", '{path} should be a text or a list of {{"type": "text"}} parts'
            )
        if kind != "text":
            raise refuse(
                "unsupported_value",
                "{path} has a part of type {value}; Gryphon's models read text only",
                value=shown(kind),
            )
        if not isinstance(part.get("text"), str):
            raise refuse("invalid_value", "{path} has a text part without a `text`")
        # cache_control is Anthropic's hint, which some clients send to everybody.
        for name in part.keys() - {"type", "text", "cache_control"}:
            raise refuse("unknown_parameter", "unknown field {value} in {path}", value=shown(name))
        texts.append(part["text"])
    return "".join(texts)


def _one_prompt(prompt: Any) -> str | list[int]:
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    if several and len(prompt) > 1:
        raise refuse(
            "unsupported_value",
            "{path} holds {count} prompts; send one request for each",
            count=str(len(prompt)),
        )
    one: Any = prompt[0] if several else prompt
    if isinstance(one, str):
        return one
    if isinstance(one, list) and one and all(map(_is_token_id, one)):
        return one
    raise refuse(
        "invalid_value",
        "{path} should be a text or a list of token ids, got {value}",
        value=shown(prompt),
    )


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


TokenLimit = Annotated[int, Field(ge=1, le=_MAX_INT)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
_STOP_STRING = {"type": "string", "minLength": 1}
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_list),
    Field(max_length=16),
    WithJsonSchema(
        {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": 16}]}
    ),
]


class StreamOptions(Fields):
    """`stream_options`; no effect unless `stream` is true."""

    # Padding against traffic analysis; nothing leaves this machine.
    without_effect = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class ChatMessage(Fields):
    """One of `messages`."""

    without_effect = frozenset({"name", "cache_control"})
    # What our own answers carry, and thus clients send back: empty here.
    only_neutral = {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "tool_calls": ([],),
        "function_call": (),
        "tool_call_id": (),
    }

    role: Annotated[
        str, AfterValidator(_role), WithJsonSchema({"type": "string", "enum": list(_ROLES)})
    ]
    content: Annotated[str, BeforeValidator(_joined_text)]
    reasoning_content: str | None = None
    """What the model thought before it, as our own answers say it; the template decides."""

    @model_validator(mode="after")
    def _only_the_assistant_reasons(self) -> ChatMessage:
        if self.reasoning_content and self.role != "assistant":
            raise refuse(
                "invalid_value",
                "{path} is for the role assistant alone",
                field="reasoning_content",
            )
        return self


class GenerationFields(Fields):
    """What chat and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    max_tokens: TokenLimit | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """What the request says; the rest is left to the model and the house."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Sampling(**given)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatFields(GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    without_effect = _WITHOUT_EFFECT | {"parallel_tool_calls", "prediction"}
    only_neutral = _ONLY_NEUTRAL | {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "reasoning_effort": ("medium",),
        "audio": (),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatFields:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse(
                "invalid_value", "{path} needs `logprobs` to be true", field="top_logprobs"
            )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refuse(
                "invalid_value",
                "{path} and `max_completion_tokens` differ; send one of them",
                field="max_tokens",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """max_completion_tokens, or max_tokens by its older name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionFields(GenerationFields):
    """Body of `POST /v1/completions`."""

    without_effect = _WITHOUT_EFFECT
    only_neutral = _ONLY_NEUTRAL | {"best_of": (1,), "echo": (False,), "suffix": ("",)}

    prompt: Annotated[
        str | list[int],
        PlainValidator(_one_prompt),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                ]
            }
        ),
    ]
    logprobs: Alternatives | None = None
