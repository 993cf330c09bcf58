"""`/openapi.json`: FastAPI's document, completed by what every route of a dialect may answer.

Routes describe their bodies. What is the same for all of a dialect is said here once: which errors
there are and what they look like, and in which form streams come.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.server.errors import ApiError, error_body

_METHODS = ("get", "head", "post", "put", "patch", "delete")

_ERRORS = {
    400: "The request is malformed, or asks for what this model or endpoint cannot do.",
    401: "The API key is missing or wrong.",
    403: "The host, or the web page that asks, is not allowed; or the command line does this.",
    404: "There is no such route or model.",
    408: "The body took too long to come.",
    413: "The body is too long.",
    415: "The body is not declared as application/json.",
    500: "A fault of Gryphon's, or of its engine.",
    503: "Busy, out of memory or closing; Retry-After says when to try again.",
}
_WITH_BODY_ONLY = (408, 413, 415)

_STREAMS = {"/api/": "application/x-ndjson"}
# llama.cpp answers a list where several completions were asked for.
_SHAPES = {"/infill": {"type": ["object", "array"]}}
_OBJECT = {"type": "object"}
_TEXT = {"schema": {"type": "string"}}
_ANY_BODY = {"required": True, "content": {"application/json": {"schema": _OBJECT}}}
"""Of a route that reads none: it must be declared as JSON all the same."""


def complete(app: FastAPI, *, has_key: bool) -> None:
    """Have `app` describe itself completely; call it when all routes are there.

    Args:
        has_key: Whether the endpoint asks for an API key.
    """
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            _complete(document, has_key)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], has_key: bool) -> None:
    # FastAPI's own shape of a refused parameter, which no route here answers with.
    document.get("components", {}).pop("schemas", None)
    if has_key:
        schemes = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document.setdefault("components", {})["securitySchemes"] = schemes
        document["security"] = [{"bearer": []}, {"apiKey": []}]
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                if method == "post":
                    operations[method].setdefault("requestBody", _ANY_BODY)
                operations[method]["responses"] = _responses(path, method, operations[method])


def _responses(path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    declared = operation.get("responses", {})
    declared.pop("422", None)
    responses = {
        status: answer
        for status, answer in declared.items()
        # FastAPI's stand-in for a route that says nothing about its answer.
        if answer.get("content") != {"application/json": {"schema": {}}}
    }
    if not any(status.startswith("2") for status in responses):
        responses = {"200": _success(path, operation)} | responses
    has_body = "requestBody" in operation
    for status, description in _ERRORS.items():
        if has_body or status not in _WITH_BODY_ONLY:
            responses.setdefault(str(status), _error(path, status, description))
    if method == "head":
        for answer in responses.values():
            answer.pop("content", None)
    return dict(sorted(responses.items()))


def _success(path: str, operation: dict[str, Any]) -> dict[str, Any]:
    schema = _SHAPES.get(path, _OBJECT)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if "stream" in body.get("schema", {}).get("properties", {}):
        kinds = (kind for begin, kind in _STREAMS.items() if path.startswith(begin))
        content[next(kinds, "text/event-stream")] = _TEXT
    return {"description": "The answer.", "content": content}


def _error(path: str, status: int, description: str) -> dict[str, Any]:
    schema = _shape(error_body(path, ApiError(status, "code", "message")))
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": schema}},
    }
    header = {"description": "Seconds.", "required": True, "schema": {"type": "string"}}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        answer["headers"] = {"Retry-After": header}
    if status == HTTPStatus.UNAUTHORIZED:
        answer["headers"] = {"WWW-Authenticate": header | {"description": "The scheme."}}
    return answer


def _shape(value: Any) -> dict[str, Any]:
    """The schema of JSON like `value`: the same keys, each of its type; null may be a text too."""
    match value:
        case dict():
            properties = {name: _shape(one) for name, one in value.items()}
            return {"type": "object", "properties": properties, "required": list(properties)}
        case None:
            return {"anyOf": [{"type": "string"}, {"type": "null"}]}
        case int():
            return {"type": "integer"}
    return {"type": "string"}
