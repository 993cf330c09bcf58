"""`input` of `POST /v1/responses`: items that become the messages of a conversation.

The reasoning, the text and the calls of one turn are items of their own there, and one message in
chat templates: in that order they are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from app.engine.protocol import Message, ToolCallPart
from app.server.chat_messages import joined_text
from app.server.validation import Fields, refuse, shown

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What comes with answers that are sent back; the last two are Codex's.
_BESIDES = frozenset(
    {
        "id",
        "status",
        "phase",
        "caller",
        "end_turn",
        "internal_chat_message_metadata_passthrough",
    }
)
_TEXT_PARTS = ("input_text", "output_text", "text")


def _text(content: Any) -> Any:
    return joined_text(content, _TEXT_PARTS)


_PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"enum": list(_TEXT_PARTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Text = Annotated[
    str,
    BeforeValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]


class MessageItem(Fields):
    """What somebody said. Its type may be left out."""

    without_effect = _BESIDES

    type: str = "message"
    role: Annotated[str, WithJsonSchema({"enum": list(_ROLES)})]
    content: Text

    @model_validator(mode="after")
    def _has_a_role(self) -> MessageItem:
        if self.role not in _ROLES:
            raise refuse(
                "invalid_value",
                "{path} should be system, developer, user or assistant, got {value}",
                field="role",
                value=shown(self.role),
            )
        return self


class CallItem(Fields):
    """What the model called."""

    without_effect = _BESIDES
    only_neutral = {"async": (False,)}

    type: str
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class OutputItem(Fields):
    """The result of a call."""

    without_effect = _BESIDES

    type: str
    call_id: Annotated[str, Field(min_length=1)]
    output: Text
    name: str | None = None
    namespace: str | None = None


class ReasoningPart(Fields):
    """A part of what the model thought, or of its summary."""

    type: str
    text: str


class ReasoningItem(Fields):
    """What the model thought. A summary is not what it thought, and nothing encrypted was made
    here: both are without effect."""

    without_effect = _BESIDES | {"encrypted_content", "summary"}

    type: str
    content: list[ReasoningPart] | None = None


Item = MessageItem | CallItem | OutputItem | ReasoningItem
_KINDS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}


def _item(value: Any) -> Any:
    if not isinstance(value, dict):
        raise refuse("invalid_value", "{path} should be an object, got {value}", value=shown(value))
    kind = value.get("type", "message")
    if kind == "item_reference":
        raise refuse(
            "unsupported_value",
            "{path} refers to an earlier item, and none is stored here: send the item itself",
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise refuse(
            "unsupported_value",
            "{path} is of type {value}; Gryphon knows {kinds}",
            value=shown(kind),
            kinds=", ".join(_KINDS),
        )
    return _KINDS[kind].model_validate(value)


InputItem = Annotated[
    Item,
    BeforeValidator(_item),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"type": {"enum": list(_KINDS)}},
        }
    ),
]


def flat_name(namespace: str | None, name: str) -> str:
    """What the model is told a function in a namespace is called."""
    if not namespace:
        return name
    return f"{namespace.removesuffix('__')}__{name}"


def messages_of(items: Sequence[Item]) -> list[Message]:
    """The conversation that the items are."""
    turns: list[Message] = []
    thought = ""
    for item in items:
        match item:
            case ReasoningItem():
                thought += "".join(part.text for part in item.content or [])
                continue
            case MessageItem(role="assistant"):
                turns.append(Message("assistant", item.content, thought))
            case CallItem():
                call = ToolCallPart(
                    item.call_id, flat_name(item.namespace, item.name), item.arguments
                )
                last = turns[-1] if turns else None
                if last is not None and last.role == "assistant" and not thought:
                    turns[-1] = msgspec.structs.replace(last, tool_calls=[*last.tool_calls, call])
                else:
                    turns.append(Message("assistant", "", thought, [call]))
            case OutputItem():
                name = flat_name(item.namespace, item.name) if item.name else ""
                turns.append(Message("tool", item.output, "", [], item.call_id, name))
            case MessageItem():
                turns.append(Message(_ROLES[item.role], item.content))
        # What the model thought belongs to the turn that it went on with, if it did.
        thought = ""
    return turns
