"""The options of `gryphon run` that say what form the answer has."""

from __future__ import annotations

import argparse
from pathlib import Path

from app.engine.constraint import MAX_CONSTRAINT_BYTES, Constraint
from app.errors import GryphonError

_OPTIONS = ("format", "json_schema", "regex", "grammar")


def constraint_of(arguments: argparse.Namespace) -> Constraint | None:
    """What was asked for; None for any text.

    Raises:
        GryphonError: "usage": two of the options, a file that cannot be read, or GBNF.
    """
    given = [name for name in _OPTIONS if getattr(arguments, name) is not None]
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise GryphonError("usage", f"{names} exclude each other: give one.")
    if arguments.format is not None:
        return Constraint("json_object")
    if arguments.json_schema is not None:
        schema: str = arguments.json_schema
        is_text = schema.lstrip().startswith("{")
        return Constraint("json_schema", schema if is_text else _read("--json-schema", schema))
    if arguments.regex is not None:
        return Constraint("regex", arguments.regex)
    if arguments.grammar is not None:
        grammar = _read("--grammar", arguments.grammar)
        if "::=" in grammar:
            raise GryphonError(
                "usage",
                f"{arguments.grammar} looks like llama.cpp's GBNF; --grammar takes a Lark grammar, "
                "whose rules are written `name: ...` and begin with `start`.",
            )
        return Constraint("lark", grammar)
    return None


def _read(option: str, name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            content = file.read(MAX_CONSTRAINT_BYTES + 1)
        if len(content) > MAX_CONSTRAINT_BYTES:
            raise GryphonError(
                "usage", f"{option}: {name} may have {MAX_CONSTRAINT_BYTES} bytes, it has more."
            )
        return content.decode()
    except OSError as error:
        reason = error.strerror or error
        raise GryphonError("usage", f"{option} cannot read {name}: {reason}.") from error
    except UnicodeDecodeError as error:
        raise GryphonError("usage", f"{option}: {name} is not UTF-8 text.") from error
