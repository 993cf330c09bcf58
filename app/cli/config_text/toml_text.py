"""TOML through tomlkit, which keeps comments and the order of things by itself."""

from __future__ import annotations

import tomllib
from typing import Any

import tomlkit
import tomlkit.exceptions

from app.cli.config_text import Named, Path, Unreadable


def read(text: str) -> Any:
    """The document.

    Raises:
        Unreadable: it is no TOML.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise Unreadable(str(error)) from None


def put(text: str, path: Path, value: Any) -> str:
    """Set one place; tables that are missing are added at the end."""
    try:
        document = tomlkit.parse(text)
    except (tomlkit.exceptions.TOMLKitError, ValueError) as error:
        raise Unreadable(str(error)) from None
    names = [step for step in path if not isinstance(step, Named)]
    assert len(names) == len(path), "TOML has no named members"
    place: Any = document
    for depth, name in enumerate(names[:-1]):
        if name not in place:
            # Only the innermost table needs a heading of its own.
            place[name] = tomlkit.table(is_super_table=depth + 2 < len(names))
        place = place[name]
    place[names[-1]] = value
    return tomlkit.dumps(document)
