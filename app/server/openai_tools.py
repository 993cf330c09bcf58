"""Tools and the choice among them, as OpenAI's routes say them.

Chat completions put what a thing is inside an object named after its type, responses beside the
type; otherwise they say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator, WithJsonSchema

from app.engine.conversation import ANY_TOOL, check_tools
from app.engine.protocol import Tool
from app.server.errors import ApiError
from app.server.validation import Fields, checked, refuse, shown

_WORDS = ("auto", "none", ANY_TOOL)


class FunctionFields(Fields):
    """A function that the model may call."""

    # Arguments are held to the schema where tool_choice makes the model call, and only there.
    without_effect = frozenset({"strict"})

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def tool(self) -> Tool:
        """It, as the engine tells the model of it."""
        if self.parameters is None:
            return Tool(self.name, self.description or "")
        return Tool(self.name, self.description or "", self.parameters)


def _only_function(kind: str) -> str:
    if kind != "function":
        raise refuse(
            "unsupported_value",
            "{path} = {value} is not supported: Gryphon's models call functions only",
            value=shown(kind),
        )
    return kind


FunctionType = Annotated[
    str,
    AfterValidator(_only_function),
    WithJsonSchema({"type": "string", "enum": ["function"]}),
]


class ChatTool(Fields):
    """One of `tools` of chat completions."""

    only_neutral = {"custom": ()}
    advice = {"custom": "send a function instead"}

    type: FunctionType
    function: FunctionFields


@dataclass(frozen=True)
class ToolChoice:
    """`tool_choice`: one of the engine's words or a tool's name, and which tools it leaves."""

    choice: str = "auto"
    allowed: frozenset[str] | None = None

    def of(self, tools: Sequence[Tool]) -> list[Tool]:
        """The tools that the model is told of.

        Raises:
            ApiError: 400, the choice or the tools make no sense.
        """
        names = {tool.name for tool in tools}
        named = set() if self.choice in _WORDS else {self.choice}
        for name in sorted(named | (self.allowed or frozenset())):
            if name not in names:
                raise ApiError(
                    400,
                    "invalid_value",
                    f"`tool_choice` names {shown(name)}, which is none of `tools`.",
                    param="tool_choice",
                )
        if self.choice == ANY_TOOL and not tools:
            raise ApiError(
                400,
                "invalid_value",
                '`tool_choice` = "required" needs `tools`: give at least one.',
                param="tool_choice",
            )
        left = [tool for tool in tools if self.allowed is None or tool.name in self.allowed]
        checked("tools", check_tools, left, self.choice)
        return left


def _tool_choice(value: Any, *, is_nested: bool) -> ToolChoice | None:
    """`tool_choice` as it was sent; `is_nested` in chat completions' way of saying it."""
    if value is None:
        return None
    if isinstance(value, str) and value in _WORDS:
        return ToolChoice(value)
    if (name := _function_name(value, is_nested)) is not None:
        return ToolChoice(name)
    inner = _inner(value, "allowed_tools", is_nested)
    if inner is not None and inner.keys() == {"mode", "tools"} and isinstance(inner["tools"], list):
        names = [_function_name(tool, is_nested) for tool in inner["tools"]]
        if inner["mode"] in ("auto", ANY_TOOL) and names and None not in names:
            return ToolChoice(inner["mode"], frozenset(name for name in names if name))
    raise refuse(
        "invalid_value",
        "{path} should be auto, none, required, a function, or allowed_tools with a mode and "
        "functions, got {value}",
        value=_described(value),
    )


def _inner(value: Any, kind: str, is_nested: bool) -> dict[str, Any] | None:
    """What an object of type `kind` says, None if it is none."""
    if not isinstance(value, dict) or value.get("type") != kind:
        return None
    rest = {key: given for key, given in value.items() if key != "type"}
    if not is_nested:
        return rest
    inner = rest.get(kind)
    return inner if rest.keys() == {kind} and isinstance(inner, dict) else None


def _function_name(value: Any, is_nested: bool) -> str | None:
    inner = _inner(value, "function", is_nested)
    if inner is None or inner.keys() != {"name"} or not isinstance(inner["name"], str):
        return None
    # The engine would take these for its own words.
    return None if inner["name"] in _WORDS else inner["name"]


def _described(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"an object of type {shown(kind)}" if isinstance(kind, str) else shown(value)


_CHOICE_SCHEMA = {
    "anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]
}
ChatToolChoice = Annotated[
    ToolChoice | None,
    PlainValidator(partial(_tool_choice, is_nested=True)),
    WithJsonSchema(_CHOICE_SCHEMA),
]
ResponsesToolChoice = Annotated[
    ToolChoice | None,
    PlainValidator(partial(_tool_choice, is_nested=False)),
    WithJsonSchema(_CHOICE_SCHEMA),
]
