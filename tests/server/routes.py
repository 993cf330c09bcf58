"""All routes of the application as it is, each with a body that it takes: for what must hold
everywhere, also on a route that somebody adds tomorrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import FastAPI

from app.server.application import create_app

from .conftest import SMOL, FakeModels, Switchboard

_TEXTS = ("messages", "prompt", "input", "content")


@cache
def application() -> FastAPI:
    return create_app(Switchboard(), models=FakeModels())


@dataclass(frozen=True)
class Route:
    method: str
    path: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def url(self) -> str:
        """The path with an installed model's name in its parameters."""
        return re.sub(r"\{[^}]*\}", SMOL.name, self.path)

    @property
    def documented(self) -> str:
        """The path as the document writes it."""
        return re.sub(r":[a-z]+\}", "}", self.path)

    @property
    def operation(self) -> dict[str, Any]:
        """What the document says; {} for a route that it leaves out."""
        paths = application().openapi()["paths"]
        found: dict[str, Any] = paths.get(self.documented, {}).get(self.method.lower(), {})
        return found

    @property
    def schema(self) -> dict[str, Any] | None:
        """Of its JSON body; None when it takes none."""
        content = self.operation.get("requestBody", {}).get("content", {})
        found: dict[str, Any] | None = content.get("application/json", {}).get("schema")
        return found

    @property
    def is_streamed(self) -> bool:
        return "stream" in (self.schema or {}).get("properties", {})

    def body(self, **more: Any) -> dict[str, Any] | None:
        """A small one, and `more`; a dialect's text is "Hello"."""
        if self.schema is None:
            return None
        body: dict[str, Any] = example(self.schema) | more
        return body

    def encoded(self, **more: Any) -> bytes:
        body = self.body(**more)
        return b"" if body is None else json.dumps(body).encode()


def example(schema: dict[str, Any], name: str = "") -> Any:
    """JSON that fits `schema`: the required fields, and those that hold what is asked."""
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return example(schema[several][0], name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return "user" if "user" in schema["enum"] else schema["enum"][0]
    match schema.get("type"):
        case "object":
            required = schema.get("required", [])
            fields = schema.get("properties", {})
            keys = [*required, *(key for key in _TEXTS if key in fields and key not in required)]
            return {key: example(fields.get(key, {}), key) for key in keys}
        case "array":
            return [example(schema.get("items", {}), name)]
        case "integer" | "number":
            return 1000 if name.startswith("max") else int(schema.get("minimum", 1))
        case "boolean":
            return False
    return SMOL.name if name == "model" else "Hello"


def _routes(of: Any, prefix: str = "") -> Iterator[Route]:
    for route in of.routes:
        if hasattr(route, "original_router"):  # FastAPI's wrapper of one that was included
            yield from _routes(route.original_router, prefix + route.include_context.prefix)
        for method in sorted(getattr(route, "methods", None) or ()):
            yield Route(method, prefix + route.path)


ROUTES = list(dict.fromkeys(_routes(application())))
POSTS = [route for route in ROUTES if route.method == "POST"]
STREAMS = [route for route in POSTS if route.is_streamed]
