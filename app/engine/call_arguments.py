"""A tool's JSON schema as what a call's arguments are held to, all at once or one by one.

Formats that write arguments between tags or as Python's have no JSON object to hold to a schema:
there each declared property is held to its own, and a schema that says more is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from app.engine.call_readers import read_value
from app.engine.conversation import Tool
from app.engine.json_schema import ANNOTATIONS
from app.errors import GryphonError

_KEY = re.compile(r"[\w.-]{1,64}")
_DEFINITIONS = ("$defs", "definitions")
# What an object made of some declared properties, and all required ones, is valid by.
_DECLARING = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS}
# Keywords that leave nothing to a value of type string but to be one.
_ANY_TEXT = {"type", *ANNOTATIONS}


def object_schema(tool: Tool) -> dict[str, Any]:
    """The schema of all arguments together, which are an object whatever it says."""
    return tool.parameters | {"type": "object"}


def one_schema(tool: Tool, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of one argument by itself, with what it may refer to."""
    shared = {key: tool.parameters[key] for key in _DEFINITIONS if key in tool.parameters}
    return schema | shared


def listed(tool: Tool) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """A tool's arguments in their order: key, schema, whether it is required.

    Raises:
        GryphonError: "unsupported_constraint": the schema says more than that.
    """
    parameters = tool.parameters
    for keyword in parameters:
        if not (keyword in _DECLARING | ANNOTATIONS or keyword.startswith("x-")):
            raise _refused(tool, f"its parameters' {keyword!r} cannot be enforced")
    properties = parameters.get("properties", {})
    required = parameters.get("required", [])
    for key in required:
        if properties.get(key, False) is False:
            raise _refused(tool, f"{str(key)[:64]!r} is required and not among the properties")
    for key, schema in properties.items():
        if not _KEY.fullmatch(key):
            raise _refused(tool, f"a parameter's name cannot be {key[:80]!r}")
        if schema is not False:
            yield key, {} if schema is True else schema, key in required


def tag_choices(
    tool: Tool, key: str, schema: dict[str, Any], end: str
) -> list[str] | dict[str, Any] | None:
    """What may stand between the tags of an argument: one of these texts, JSON by this schema, or
    any text at all.

    Args:
        end: The tag that closes it.

    Raises:
        GryphonError: "unsupported_constraint": what is read there need not be valid.
    """
    named = [schema["const"]] if "const" in schema else schema.get("enum")
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if named is not None:
        if not named:
            raise _refused(tool, f"{key!r} may have no value at all")
        choices = [value if isinstance(value, str) else json.dumps(value) for value in named]
        for value, text in zip(named, choices, strict=True):
            read = read_value(text, tool, key)
            if end in text or (type(read), read) != (type(value), value):
                raise _refused(tool, f"a value that {key!r} may have would not be read as it is")
        if set(schema) - _ANY_TEXT - {"enum", "const"} or {"enum", "const"} <= set(schema):
            raise _refused(tool, f"{key!r} is held to more than its enum or const")
        if kinds and not all(_is_of(value, kinds) for value in named):
            raise _refused(tool, f"{key!r} may have values that are not of its type")
        return choices
    if not kinds:
        raise _refused(tool, f"{key!r} needs a type")
    if "string" not in kinds:
        return one_schema(tool, schema)
    beyond = [keyword for keyword in schema if keyword not in _ANY_TEXT]
    if beyond:
        raise _refused(tool, f"{beyond[0]!r} of the string {key!r} cannot be enforced")
    return None


def _is_of(value: Any, kinds: list[str]) -> bool:
    names: dict[type, set[str]] = {
        str: {"string"},
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        list: {"array"},
        dict: {"object"},
        type(None): {"null"},
    }
    return bool(names[type(value)] & set(kinds))


def _refused(tool: Tool, why: str) -> GryphonError:
    return GryphonError(
        "unsupported_constraint",
        f"The tool {tool.name!r} cannot be enforced in this model's way of writing calls: {why}. "
        "Use auto, or change the tool.",
    )
