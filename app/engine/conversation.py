"""What people, models and tools say to each other, and what a client may send of it.

No MLX here, nor anything that imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from app.engine.json_schema import check_keywords
from app.errors import GryphonError


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call; whoever asked runs it and sends the result."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = msgspec.field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )
    """JSON schema of its arguments, an object."""


class ToolCallPart(msgspec.Struct, frozen=True):
    """A call that the model made in an earlier turn."""

    id: str
    name: str
    arguments: str
    """JSON text of an object."""


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str
    reasoning: str = ""
    """What the model thought before `content`; most templates leave it out of later prompts."""
    tool_calls: list[ToolCallPart] = []
    """What the model called after `content`; only in the role "assistant"."""
    tool_call_id: str = ""
    """Which call this is the result of, in the role "tool"."""
    name: str = ""
    """Of the tool whose result this is."""


MAX_MESSAGES = 10_000
# The tool_choice that makes the model call one of its tools, whichever it likes.
ANY_TOOL = "required"
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1024 * 1024
MAX_TOOL_CALLS = 1024
MAX_ARGUMENTS_CHARACTERS = 4 * 1024 * 1024
MAX_OPTIONS_BYTES = 64 * 1024
MAX_JSON_DEPTH = 32
MAX_JSON_VALUES = 100_000
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

# What the engine itself gives to templates, under the names that transformers gives it.
RESERVED_OPTIONS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"xml_tools", "python_tools"}
    | {"raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner"}
    | {"namespace", "loop", "self", "caller", "varargs", "kwargs"}
    | {f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
)


def check_tools(tools: Sequence[Tool], tool_choice: str) -> None:
    """Refuse tools that no model could be told of.

    Raises:
        GryphonError: "invalid_request", naming the tool and what is wrong with it.
    """
    if len(tools) > MAX_TOOLS:
        raise _invalid(f"tools may hold {MAX_TOOLS} tools at most, got {len(tools)}.")
    names: set[str] = set()
    size = 0
    for tool in tools:
        _check_name(tool.name, "A tool's name")
        if tool.name in names:
            raise _invalid(f"tools holds {tool.name!r} twice: give each tool a name of its own.")
        names.add(tool.name)
        size += len(tool.description) + _json_size(tool.parameters, f"parameters of {tool.name!r}")
    if size > MAX_TOOLS_BYTES:
        raise _invalid(
            f"tools may take {MAX_TOOLS_BYTES} bytes of descriptions and parameters, got {size}."
        )
    if tool_choice not in {"auto", "none", ANY_TOOL, *names}:
        raise _invalid(
            "tool_choice must be auto, none, required or the name of a tool that is given, "
            f"got {tool_choice[:64]!r}."
        )
    if tool_choice in ("auto", "none"):
        return
    if not tools:
        raise _invalid(f"tool_choice {tool_choice!r} needs tools: give at least one.")
    for tool in tools:
        if tool_choice in (ANY_TOOL, tool.name):
            _check_enforced(tool, tool_choice)


def _check_enforced(tool: Tool, tool_choice: str) -> None:
    """Refuse a tool of whose parameters something would not be enforced."""
    try:
        check_keywords(tool.parameters)
        kinds = tool.parameters.get("type", "object")
        if "object" not in ([kinds] if isinstance(kinds, str) else kinds):
            raise GryphonError("invalid_constraint", f"The type must be object, got {kinds}.")
    except GryphonError as error:
        raise GryphonError(
            error.code,
            f"tool_choice {tool_choice!r} cannot be enforced by the parameters of {tool.name!r}. "
            f"{error.message} Or use auto.",
        ) from error


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse too many, and tool calls and results that do not belong where they are.

    Raises:
        GryphonError: "invalid_request", naming the message and what is wrong with it.
    """
    if len(messages) > MAX_MESSAGES:
        raise _invalid(f"messages may hold {MAX_MESSAGES} at most, got {len(messages)}.")
    calls = size = 0
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role != "assistant" and (message.tool_calls or message.reasoning):
            raise _invalid(
                f"{where} has the role {message.role[:64]!r}: only the assistant calls tools and "
                "reasons."
            )
        if message.role != "tool" and message.tool_call_id:
            raise _invalid(f"{where} has a tool_call_id, so its role must be tool.")
        if message.name and message.role == "tool":
            _check_name(message.name, f"The tool's name in {where}")
        calls += len(message.tool_calls)
        if calls > MAX_TOOL_CALLS:
            raise _invalid(f"messages may hold {MAX_TOOL_CALLS} tool calls in all.")
        for call in message.tool_calls:
            size += len(call.arguments)
            if size > MAX_ARGUMENTS_CHARACTERS:
                raise _invalid(
                    f"The arguments of the tool calls in messages may have "
                    f"{MAX_ARGUMENTS_CHARACTERS} characters in all."
                )
            _check_name(call.name, f"A called tool's name in {where}")
            if parsed_arguments(call.arguments) is None:
                raise _invalid(
                    f"The arguments of {call.name!r} in {where} must be the JSON text of an "
                    f"object of at most {MAX_JSON_DEPTH} levels, got {call.arguments[:64]!r}."
                )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse template options that are none, or would replace what the engine gives.

    Raises:
        GryphonError: "invalid_request", naming the option.
    """
    size = _json_size(options, "template_options")
    if size > MAX_OPTIONS_BYTES:
        raise _invalid(f"template_options may take {MAX_OPTIONS_BYTES} bytes, got {size}.")
    for name in options:
        if not _OPTION.fullmatch(name):
            raise _invalid(f"template_options holds {name[:64]!r}, which is no variable's name.")
        if name in RESERVED_OPTIONS:
            raise _invalid(f"template_options may not hold {name!r}: the engine itself sets it.")


def parsed_arguments(text: str) -> dict[str, Any] | None:
    """The object that JSON text stands for; None for anything else."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        sound = isinstance(value, dict) and depth_of(value) <= MAX_JSON_DEPTH
    except (ValueError, RecursionError):
        return None
    return value if sound else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def depth_of(value: Any) -> int:
    """Levels of objects and arrays; `MAX_JSON_DEPTH` + 1 for anything deeper, or of more than
    `MAX_JSON_VALUES` values."""
    level, depth, values = [value], 0, 0
    while level and depth <= MAX_JSON_DEPTH:
        values += len(level)
        if values > MAX_JSON_VALUES:
            return MAX_JSON_DEPTH + 1
        inner = [item for item in level if isinstance(item, (dict, list, tuple))]
        depth += bool(inner)
        level = [
            child for item in inner for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _json_size(value: Any, what: str) -> int:
    if depth_of(value) > MAX_JSON_DEPTH:
        raise _invalid(
            f"{what} may have {MAX_JSON_DEPTH} levels at most, and {MAX_JSON_VALUES} values."
        )
    try:
        # Sorted, as the engine writes options to compare them: keys of several types have no order.
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)
        return len(text.encode())
    except (TypeError, ValueError) as error:
        raise _invalid(f"{what} must be JSON, with text for keys: {error}.") from error


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise _invalid(
            f'{what} must be 1 to 64 letters, digits, "_", "." or "-", got {name[:80]!r}.'
        )


def _invalid(message: str) -> GryphonError:
    return GryphonError("invalid_request", message)
