"""From a request's bytes to a checked pydantic model, or one clear 400.

Strict: a number in quotes is not a number. Three kinds of fields besides those a model declares:
accepted without effect, refused unless they hold a value that changes nothing, and unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from app.errors import GryphonError
from app.server.errors import ApiError

_SHOWN = 80
_P = ParamSpec("_P")


class Fields(BaseModel):
    """A JSON object of a dialect, every field of it accounted for."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields that clients send and that cannot change the output; any value is accepted."""
    only_neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that would change the output: refused unless null or one of these values."""
    advice: ClassVar[dict[str, str]] = {}
    """What to do instead of sending one of those; by default, to leave it out."""

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {}
        for name, value in data.items():
            if name in cls.model_fields:
                known[name] = value
            elif name in cls.only_neutral:
                if not _is_neutral(value, cls.only_neutral[name]):
                    raise refuse(
                        "unsupported_parameter",
                        "{path} = {value} is not supported by Gryphon and would change the answer; "
                        "{advice}",
                        field=name,
                        value=shown(value),
                        advice=cls.advice.get(name, "leave the field out"),
                    )
            elif name not in cls.without_effect:
                raise refuse("unknown_parameter", "unknown field {path}", field=name)
        return known

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The checked object in `body`.

        Raises:
            ApiError: 400, naming the place in the JSON, or the field, the expectation, the value.
        """
        return parse(cls, body)


_Fields = TypeVar("_Fields", bound=Fields)


def parse(model: type[_Fields], body: bytes) -> _Fields:
    """The `model` in `body`; see `Fields.parse`."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason, _, place = str(error).rpartition(" at ")
        raise ApiError(400, "invalid_json", f"Invalid JSON at {place}: {reason}.") from None
    if not isinstance(data, dict):
        raise ApiError(400, "invalid_json", f"The body should be a JSON object, got {shown(data)}.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)[0]) from None


def schema_of(fields: type[Fields]) -> Any:
    """JSON schema of `fields` in one piece: inside a route OpenAPI has no place for `$defs`."""
    schema = fields.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(definitions[node["$ref"].rpartition("/")[2]])
        return {name: inlined(value) for name, value in node.items()}

    return inlined(schema)


def body_of(fields: type[Fields]) -> dict[str, Any]:
    """OpenAPI's description of a body that the handler reads itself."""
    content = {"application/json": {"schema": schema_of(fields)}}
    return {"requestBody": {"required": True, "content": content}}


def refuse(code: str, template: str, *, field: str | None = None, **values: str) -> Exception:
    """The error to raise in a validator; `{path}` in `template` is where it happened."""
    context = {"template": template, "field": field, **values}
    return PydanticCustomError(code, "{template}", context)


def checked(param: str, check: Callable[_P, None], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """One of the engine's own checks, made where the field to blame is known.

    Raises:
        ApiError: 400, with that field as `param`.
    """
    try:
        check(*args, **kwargs)
    except GryphonError as error:
        raise ApiError(400, error.code, error.message, param=param) from None


def shown(value: Any) -> str:
    """`value` as JSON, shortened."""
    # A container is named, not encoded: it may be megabytes.
    if isinstance(value, list) and value:
        return f"a list of {len(value)}"
    if isinstance(value, dict) and value:
        return "an object"
    text = msgspec.json.encode(value[: _SHOWN + 1] if isinstance(value, str) else value).decode()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True == 1 in Python, but `"n": true` is not `"n": 1`.
    return value is None or any(type(value) is type(one) and value == one for one in neutral)


def _path(error: ErrorDetails) -> str:
    """Where: `messages[0].content`."""
    field = error.get("ctx", {}).get("field")
    path = ""
    for part in (*error["loc"], *([field] if field else ())):
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    path = path.lstrip(".")
    return path if len(path) <= _SHOWN else path[:_SHOWN] + "…"


def _explained(error: ErrorDetails) -> ApiError:
    path = _path(error)
    context = error.get("ctx", {})
    if "template" in context:
        values = {
            name: value for name, value in context.items() if name not in ("template", "field")
        }
        message = context["template"].format(path=f"`{path}`", **values)
        return ApiError(400, error["type"], message[0].upper() + message[1:] + ".", param=path)
    match error["type"]:
        case "missing":
            return ApiError(400, "missing_required_parameter", f"`{path}` is required.", param=path)
        case "model_type":
            expected = "should be an object"
        case "too_short":
            expected = f"should have at least {context['min_length']} item(s)"
        case "too_long":
            expected = f"should have at most {context['max_length']} items"
        case _:
            expected = re.sub(r"^(Input|String|List) ", "", error["msg"])
    message = f"`{path}` {expected}, got {shown(error['input'])}."
    return ApiError(400, "invalid_value", message, param=path)
