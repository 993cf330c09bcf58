"""`messages` of chat completions, and texts that come in parts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from app.engine.protocol import Message, ToolCallPart
from app.server.openai_tools import FunctionType
from app.server.validation import Fields, refuse, shown

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def _role(role: str) -> str:
    if role == "function":
        raise refuse(
            "unsupported_value",
            '{path} = "function" is not supported: give the results of tools in the role tool',
        )
    if role not in _ROLES:
        raise refuse(
            "invalid_value",
            "{path} should be system, developer, user, assistant or tool, got {value}",
            value=shown(role),
        )
    return _ROLES[role]


def joined_text(content: Any, kinds: Collection[str] = ("text",)) -> Any:
    """Text parts joined as they are: a client that splits a text puts the spaces where it wants.

    Args:
        kinds: What a part of text may call its type.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise refuse(
                "invalid_value",
                '{path} should be a text or a list of {{"type": {kind}}} parts',
                kind=shown(next(iter(kinds))),
            )
        if kind not in kinds:
            raise refuse(
                "unsupported_value",
                "{path} has a part of type {value}; Gryphon's models read text only",
                value=shown(kind),
            )
        if not isinstance(part.get("text"), str):
            raise refuse("invalid_value", "{path} has a text part without a `text`")
        for name in part.keys() - _PART_FIELDS:
            raise refuse("unknown_parameter", "unknown field {value} in {path}", value=shown(name))
        texts.append(part["text"])
    return "".join(texts)


# cache_control is Anthropic's hint, which some clients send to everybody, and the breakpoint
# OpenAI's; annotations and logprobs come with answers that are sent back.
_PART_FIELDS = {
    "type",
    "text",
    "cache_control",
    "prompt_cache_breakpoint",
    "annotations",
    "logprobs",
}


class CalledFunction(Fields):
    """What an earlier tool call called."""

    name: str
    arguments: str


class MessageToolCall(Fields):
    """One of an assistant message's `tool_calls`."""

    # Where a streamed call stood; some clients send it back.
    without_effect = frozenset({"index"})
    only_neutral = {"custom": ()}

    id: str
    type: FunctionType = "function"
    function: CalledFunction


def _content_schema() -> dict[str, Any]:
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    return {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": part},
            {"type": "null"},
        ]
    }


class ChatMessage(Fields):
    """One of `messages`."""

    without_effect = frozenset({"cache_control"})
    # What our own answers carry, and thus clients send back: empty here.
    only_neutral = {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
    }
    advice = {"function_call": "send `tool_calls` instead"}

    role: Annotated[
        str, AfterValidator(_role), WithJsonSchema({"type": "string", "enum": list(_ROLES)})
    ]
    content: Annotated[
        str | None, BeforeValidator(joined_text), WithJsonSchema(_content_schema())
    ] = None
    name: str | None = None
    """Of the tool whose result this is; without effect in other roles."""
    reasoning_content: str | None = None
    """What the model thought before it, as our own answers say it; the template decides."""
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=1024)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _belongs_to_the_role(self) -> ChatMessage:
        for field, role in (
            ("reasoning_content", "assistant"),
            ("tool_calls", "assistant"),
            ("tool_call_id", "tool"),
        ):
            if getattr(self, field) and self.role != role:
                raise refuse(
                    "invalid_value", "{path} is for the role {role} alone", field=field, role=role
                )
        if self.role == "tool" and not self.tool_call_id:
            raise refuse(
                "missing_required_parameter",
                "{path} is required in the role tool: which call this is the result of",
                field="tool_call_id",
            )
        # A model that said nothing, or only called tools, has no content.
        if self.content is None and self.role != "assistant":
            raise refuse(
                "missing_required_parameter",
                "{path} is required in the role {role}",
                field="content",
                role=self.role,
            )
        return self

    @property
    def message(self) -> Message:
        """It, as the engine gives it to the chat template."""
        calls = [
            ToolCallPart(call.id, call.function.name, call.function.arguments)
            for call in self.tool_calls or []
        ]
        return Message(
            self.role,
            self.content or "",
            self.reasoning_content or "",
            calls,
            self.tool_call_id or "",
            (self.name or "") if self.role == "tool" else "",
        )
