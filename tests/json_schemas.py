"""JSON schemas drawn at random whose values are all of a bounded size."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ["a", "naïve", "日本", "π", 'q"uote', "back\\slash", "line\nbreak", "🙂", "", " sp ace "]
_PATTERNS = ["^[a-z]{1,4}$", "^(é|ü|🙂){2}$", "^[0-9]{2}-[0-9]{2}$", "^x?y+z{0,2}$", "^[^a-z]{3}$"]
_FORMATS = ["date", "ipv4", "ipv6", "uuid"]


def random_schema(draw: random.Random) -> dict[str, Any]:
    """A schema with definitions that it refers to."""
    definitions = {f"d{i}": _schema(draw, depth=1, definitions=[]) for i in range(2)}
    schema = _schema(draw, depth=3, definitions=list(definitions))
    return {**schema, "$defs": definitions}


def _schema(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    kinds = [_enum, _constant, _integer, _number, _string, _plain]
    if depth:
        kinds = [*kinds[:5], _array, _array, _tuple, _object, _object, _object, _map, _union, _both]
    if definitions and draw.random() < 0.15:
        return {"$ref": f"#/$defs/{draw.choice(definitions)}"}
    return draw.choice(kinds)(draw, depth, definitions)


def _plain(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def _enum(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"enum": draw.sample([*_WORDS, 1, -2.5, True, None, [1, "x"], {"k": "ü"}], k=3)}


def _constant(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"const": draw.choice([*_WORDS, 0, {"deep": [1, {"er": None}]}])}


def _integer(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low = draw.randint(-2000, 2000)
    high = low + draw.choice([3, 17, 1000, 100_000])
    low_name, high_name = draw.choice(
        [("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]
    )
    schema = {"type": "integer", low_name: low, high_name: high}
    if high - low > 900 and draw.random() < 0.3:
        schema["multipleOf"] = draw.choice([2, 5, 7])
    return schema


def _number(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    low = draw.randint(-50, 50) / 4
    return {"type": "number", "minimum": low, "maximum": low + draw.choice([0.5, 3, 1000])}


def _string(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    how = draw.randrange(3)
    if how == 0:
        return {"type": "string", "pattern": draw.choice(_PATTERNS)}
    if how == 1:
        return {"type": "string", "format": draw.choice(_FORMATS)}
    least = draw.randint(0, 5)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 8)}


def _array(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(draw, depth - 1, definitions),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _tuple(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    parts = [_schema(draw, depth - 1, definitions) for _ in range(draw.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts) - 1}


def _object(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    names = draw.sample(["id", "naïve", "名前", "a b", 'q"', "🙂", "tags"], k=draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(draw, depth - 1, definitions) for name in names},
        "required": draw.sample(names, k=draw.randint(0, len(names))),
        "additionalProperties": False,
    }


def _map(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    values = _schema(draw, depth - 1, definitions)
    if draw.random() < 0.5:
        return {
            "type": "object",
            "patternProperties": {"^k[0-9]$": values},
            "additionalProperties": False,
            "maxProperties": 2,
        }
    return {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["id"],
        "additionalProperties": values,
        "maxProperties": 3,
    }


def _union(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"anyOf": [_schema(draw, depth - 1, definitions) for _ in range(draw.randint(2, 3))]}


def _both(draw: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    one = {
        "type": "object",
        "properties": {"left": _schema(draw, depth - 1, definitions)},
        "required": ["left"],
    }
    other = {
        "properties": {"right": _schema(draw, depth - 1, definitions), "left": True},
        "additionalProperties": False,
    }
    return {"allOf": [one, other]}
