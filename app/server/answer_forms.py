"""What an answer is held to, as OpenAI's routes and vLLM say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from app.engine.constraint import Constraint, ConstraintKind, check_constraint
from app.engine.protocol import Tool
from app.server.errors import ApiError
from app.server.validation import checked, refuse, shown

_MAX_CHOICE = 1024


def response_format(value: Any) -> Constraint | None:
    """`response_format` of chat completions; None for text."""
    return _form("response_format", value, is_nested=True)


def text_format(value: Any) -> Constraint | None:
    """`text.format` of responses, which keeps a schema beside the type; None for text."""
    return _form("text.format", value, is_nested=False)


def _form(param: str, value: Any, *, is_nested: bool) -> Constraint | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    rest = {key: said for key, said in value.items() if key != "type"} if kind else {}
    if kind == "text" and not rest:
        return None
    # llama.cpp takes a schema beside json_object.
    if kind == "json_object" and rest.keys() <= {"schema"}:
        if rest.get("schema") is None:
            return Constraint("json_object")
        return _schema(param, rest)
    if kind == "json_schema" and is_nested:
        rest = rest["json_schema"] if rest.keys() == {"json_schema"} else {"": None}
    # A name and a description are for people, and not being strict is no reason to be loose.
    if (
        kind == "json_schema"
        and isinstance(rest, dict)
        and rest.keys() <= {"name", "description", "schema", "strict"}
    ):
        return _schema(param, rest)
    raise refuse(
        "invalid_value",
        "{path} should be of type text, json_object, or json_schema with a name and a schema, "
        "got {value}",
        value=f"an object of type {shown(kind)}" if isinstance(kind, str) else shown(value),
    )


def _schema(param: str, form: dict[str, Any]) -> Constraint:
    schema = form.get("schema")
    if not isinstance(schema, dict):
        raise refuse(
            "invalid_value",
            "{path} should have a `schema`, an object, got {value}",
            value=shown(schema),
        )
    return _checked(param, "json_schema", json.dumps(schema))


def _checked(param: str, kind: ConstraintKind, text: str = "") -> Constraint:
    constraint = Constraint(kind, text)
    checked(param, check_constraint, constraint)
    return constraint


def _structured_outputs(value: Any) -> Constraint | None:
    """vLLM's field: exactly one of json, regex, choice, grammar and json_object."""
    if value is None:
        return None
    said = value.items() if isinstance(value, dict) else ()
    given = {key: what for key, what in said if what is not None and what is not False}
    match given:
        case {"json": dict(schema)} if len(given) == 1:
            return _checked("structured_outputs", "json_schema", json.dumps(schema))
        case {"json": str(text)} if len(given) == 1:
            return _checked("structured_outputs", "json_schema", text)
        case {"regex": str(text)} if len(given) == 1:
            return _checked("structured_outputs", "regex", text)
        case {"grammar": str(text)} if len(given) == 1:
            return _checked("structured_outputs", "lark", text)
        case {"json_object": True} if len(given) == 1:
            return Constraint("json_object")
        case {"choice": list(texts)} if len(given) == 1 and _are_choices(texts):
            grammar = f"start: {' | '.join(map(json.dumps, texts))}"
            return _checked("structured_outputs", "lark", grammar)
    raise refuse(
        "invalid_value",
        "{path} should hold one of json (a schema), regex, choice (up to {most} texts), grammar "
        "(Lark) and json_object (true), got {value}",
        most=str(_MAX_CHOICE),
        value=shown(value),
    )


def _are_choices(texts: list[Any]) -> bool:
    return len(texts) <= _MAX_CHOICE and all(isinstance(one, str) and one for one in texts)


def check_alone(param: str, constraint: Constraint | None, tools: Sequence[Tool]) -> None:
    """Refuse a form together with tools: a call would not have it.

    Raises:
        ApiError: 400.
    """
    if constraint is not None and tools:
        raise ApiError(
            400,
            "unsupported_value",
            f"`{param}` and `tools` cannot be combined: an answer held to a form can call no "
            'tool. Leave one of them out, or send `tool_choice` = "none".',
            param=param,
        )


_SCHEMA: dict[str, Any] = {"type": "object"}
_STRICT = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
_NAMED_SCHEMA: dict[str, Any] = {
    "name": {"type": "string"},
    "description": {"type": "string"},
    "schema": _SCHEMA,
    "strict": _STRICT,
}


def _format_schema(is_nested: bool) -> dict[str, Any]:
    named: dict[str, Any] = {"type": {"const": "json_schema"}}
    if is_nested:
        inner = {
            "type": "object",
            "properties": _NAMED_SCHEMA,
            "required": ["schema"],
            "additionalProperties": False,
        }
        named["json_schema"] = inner
    else:
        named |= _NAMED_SCHEMA
    kinds = [
        ({"type": {"const": "text"}}, ["type"]),
        ({"type": {"const": "json_object"}, "schema": _SCHEMA}, ["type"]),
        (named, ["type", "json_schema" if is_nested else "schema"]),
    ]
    forms: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        for properties, required in kinds
    ]
    return {"anyOf": [*forms, {"type": "null"}]}


ResponseFormat = Annotated[
    Constraint | None, PlainValidator(response_format), WithJsonSchema(_format_schema(True))
]
TextFormat = Annotated[
    Constraint | None, PlainValidator(text_format), WithJsonSchema(_format_schema(False))
]
StructuredOutputs = Annotated[
    Constraint | None,
    PlainValidator(_structured_outputs),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "json": {"anyOf": [_SCHEMA, {"type": "string"}]},
                        "regex": {"type": "string"},
                        "choice": {"type": "array", "items": {"type": "string"}},
                        "grammar": {"type": "string"},
                        "json_object": {"type": "boolean"},
                    },
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        }
    ),
]
