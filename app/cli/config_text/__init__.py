"""Editing the text of configuration files that people wrote: a place is set, the rest is kept.

A format is a module with `read(text)`, which gives the document or raises `Unreadable`, and
`put(text, path, value)`, which gives the text with one place set. `edited` holds each of them to
`merged`, the same change made to plain data: what a format cannot do faithfully is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_CHARACTERS = 4_000_000
MAX_DEPTH = 100


@dataclass(frozen=True)
class Named:
    """The member of a list whose "name" is this."""

    name: str


Step = str | Named
Path = tuple[Step, ...]


@dataclass(frozen=True)
class Put:
    """A place and what it shall hold: a scalar or a list. Parents that are missing are made."""

    path: Path
    value: Any
    only_if_absent: bool = False


class Unreadable(Exception):
    """The text is not what its format wants; the message says where."""


class NotEditable(Exception):
    """The text is well-formed, but the change cannot be made to it; the message says why."""


class TextFormat(Protocol):
    """What a format's module offers."""

    def read(self, text: str) -> Any: ...

    def put(self, text: str, path: Path, value: Any) -> str: ...


def puts(path: Path, values: Mapping[str, Any]) -> list[Put]:
    """One `Put` for each leaf of nested dicts under `path`."""
    found = []
    for key, value in values.items():
        place = (*path, key)
        found += puts(place, value) if isinstance(value, Mapping) else [Put(place, value)]
    return found


def spelled(path: Path) -> str:
    """A place for people: models["Gryphon"].apiBase."""
    text = ""
    for step in path:
        text += f'["{step.name}"]' if isinstance(step, Named) else f".{step}" if text else step
    return text or "the file"


def edited(text_format: TextFormat, text: str, changes: Iterable[Put]) -> str:
    """`text` with every change made; the same text where there is nothing to change.

    Raises:
        Unreadable: it cannot be parsed, or is too long.
        NotEditable: something else stands where a change wants to go, or the format cannot make it
            without touching anything else.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"it is longer than {MAX_CHARACTERS} characters")
    try:
        document = text_format.read(text)
        for change in changes:
            wanted = merged(document, change)
            if _same(wanted, document):
                continue
            text = text_format.put(text, change.path, change.value)
            document = _read_again(text_format, text)
            if not _same(wanted, document):
                place = spelled(change.path)
                raise NotEditable(f"{place} cannot be set without changing something else")
    except RecursionError:
        raise Unreadable(f"it is nested more than {MAX_DEPTH} deep") from None
    return text


def merged(document: Any, change: Put) -> Any:
    """`document`, which is not touched, with the change made.

    Raises:
        NotEditable: something else stands where it wants to go.
    """
    result = _copy(document)
    if result is None:
        result = container(change.path[0])
    place = result
    for depth, step in enumerate(change.path):
        here = change.path[:depth]
        last = depth + 1 == len(change.path)
        following = None if last else container(change.path[depth + 1])
        if isinstance(step, Named):
            place = _member(place, step, here)
            continue
        if not isinstance(place, dict):
            raise NotEditable(f"{spelled(here)} should hold settings by name")
        if last:
            if not (change.only_if_absent and place.get(step) is not None):
                place[step] = change.value
        else:
            if place.get(step) is None:
                place[step] = following
            place = place[step]
    return result


def container(step: Step) -> Any:
    """An empty collection that `step` can lead into."""
    return [] if isinstance(step, Named) else {}


def _member(place: Any, step: Named, here: Path) -> dict[str, Any]:
    if not isinstance(place, list):
        raise NotEditable(f"{spelled(here)} should hold a list")
    found = [one for one in place if isinstance(one, dict) and one.get("name") == step.name]
    if len(found) > 1:
        raise NotEditable(f'{spelled(here)} has several members named "{step.name}"')
    if not found:
        place.append({"name": step.name})
        return place[-1]  # type: ignore[no-any-return]
    return found[0]


def _read_again(text_format: TextFormat, text: str) -> Any:
    """The document after a change; None, as if it were empty, when the change broke it."""
    try:
        return text_format.read(text)
    except Unreadable:
        return None


def _copy(value: Any) -> Any:
    """A deep copy in which nothing is shared: what YAML's aliases name is one object."""
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    """Equality that tells true from 1 and 1 from 1.0, and looks at the order."""
    return repr(one) == repr(other)
