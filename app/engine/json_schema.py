"""Which keywords of JSON Schema an answer can be held to; every other one is refused by its name.

llguidance itself refuses the keywords of the specification that it cannot enforce, but takes any
other key for an annotation: so `maxlength`, OpenAPI's `nullable` or a draft 4 `exclusiveMinimum`
would be ignored without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from app.errors import GryphonError

# Where schemas are found under a keyword.
_ONE = {"items", "additionalProperties"}
_LIST = {"anyOf", "oneOf", "allOf", "prefixItems"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
_PLAIN = {
    *("type", "enum", "const", "$ref", "required"),
    *("minItems", "maxItems", "minProperties", "maxProperties"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
# What says nothing about which values are valid.
ANNOTATIONS = {
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default"),
    *("example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("contentMediaType", "contentEncoding"),
}
_SHAPED = {
    "type": "a string or a list of strings",
    "required": "a list of strings",
    "enum": "a list",
}
_KNOWN = _ONE | _LIST | _NAMED | _PLAIN | ANNOTATIONS
_MOST_DEEP = 100
# Characters of a key, or of the place of one, in a message.
_MOST_SHOWN = 100


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "type": lambda value: isinstance(value, str) or _are_strings(value),
    "required": _are_strings,
    "enum": lambda value: isinstance(value, list),
}


def check_keywords(schema: dict[str, Any]) -> None:
    """Refuse a schema of which some keyword would not be enforced.

    Raises:
        GryphonError: "invalid_constraint", with where the keyword is.
    """
    waiting: list[tuple[str, Any, int]] = [("#", schema, 0)]
    while waiting:
        place, part, depth = waiting.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise _refused(place, "a schema must be an object, true or false")
        if depth > _MOST_DEEP:
            raise _refused(place[:60], f"schemas may be nested {_MOST_DEEP} deep")
        _check_own(place, part)
        waiting += [(where, below, depth + 1) for where, below in _below(place, part)]


def _check_own(place: str, schema: dict[str, Any]) -> None:
    for key, value in schema.items():
        where = _inside(place, key)
        if key == "x-guidance" or not (key in _KNOWN or key.startswith("x-")):
            what = repr(key[:_MOST_SHOWN])
            raise _refused(where, f"{what} cannot be enforced; leave it out or say it otherwise")
        if key in _SHAPES and not _SHAPES[key](value):
            raise _refused(where, f"it must be {_SHAPED[key]}")
        if key == "items" and isinstance(value, list):
            raise _refused(where, "a list of schemas is called prefixItems now")
        if key in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
            raise _refused(where, f"it must be a number, and takes the place of {key[9:].lower()}")
        if key == "minProperties" and isinstance(value, (int, float)) and value > 1:
            # llguidance counts the same key twice where keys are free.
            raise _refused(where, "more than 1 cannot be enforced; name them in required")
        if key == "$ref" and isinstance(value, str) and "://" in value:
            raise _refused(where, "nothing is fetched; put it into $defs")


def _below(place: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in schema.items():
        where = _inside(place, key)
        if key in _ONE:
            yield where, value
        elif key in _LIST:
            if not isinstance(value, list):
                raise _refused(where, "it must be a list of schemas")
            yield from ((_inside(where, str(i)), below) for i, below in enumerate(value))
        elif key in _NAMED:
            if not isinstance(value, dict):
                raise _refused(where, "it must be an object of schemas")
            yield from ((_inside(where, name), below) for name, below in value.items())


def _inside(place: str, name: str) -> str:
    """A place for people. Of bounded length: there are as many as there are schemas."""
    if len(place) > _MOST_SHOWN:
        return place if place.endswith("/...") else f"{place}/..."
    return f"{place}/{name[:_MOST_SHOWN]}"


def _refused(place: str, why: str) -> GryphonError:
    return GryphonError("invalid_constraint", f"The JSON schema at {place}: {why}.")
