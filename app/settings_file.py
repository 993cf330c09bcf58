"""The settings file: what a person wants to hold from one start to the next, in TOML.

    keep_alive = 600                       # seconds; GRYPHON_KEEP_ALIVE wins over it
    default_model = "org/name"             # GRYPHON_MODEL wins over it

    [aliases]
    fast = "org/name"

Gryphon changes single lines of it and leaves the others, comments too, as they are. An edit is
read back before it is kept, so that a file written in a way that line edits do not understand (a
table in one line, a key with dots) is refused rather than spoiled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import paths
from app.errors import GryphonError
from app.library.file_lock import locked
from app.settings import Settings

KEEP_ALIVE_S = 300.0
"""Where neither the file nor the environment says how long a model stays in memory."""

ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
"""What an alias may be called: never like ORG/NAME, NAME@REVISION, MODEL+ADAPTER or a path."""

_MAX_BYTES = 1_000_000
_MAX_NAME = 400
_TABLE = "aliases"
_HEADER = re.compile(r"\s*\[\s*([^\[\]]*?)\s*\]\s*(?:#.*)?$")
_PAIR = re.compile(r"""(\s*(?:"([^"\\]*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*=\s*)(.*)$""")
_VALUE = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*'|[^\s#"'\[{]+)(\s*(?:#.*)?)$""")


@dataclass(frozen=True)
class Stored:
    """What the file says; None where it does not."""

    keep_alive_s: float | None = None
    default_model: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Alias → name of the model."""


def read() -> Stored:
    """What the file says; an absent file says nothing.

    Raises:
        GryphonError: "invalid_setting", naming the file, the line and what was expected.
    """
    path = paths.settings_file()
    return _parse(path, _text(path))


def keep_alive_s() -> float:
    """Seconds a model stays in memory after its last request: the environment's, else the file's.

    Raises:
        GryphonError: "invalid_setting".
    """
    wanted = Settings.from_environment().keep_alive_s
    if wanted is None:
        wanted = read().keep_alive_s
    return KEEP_ALIVE_S if wanted is None else wanted


def set_default_model(name: str | None) -> None:
    """Write `default_model`, or remove it.

    Raises:
        GryphonError: "invalid_setting", or "no_write_permission".
    """
    _edit(None, "default_model", name)


def set_alias(alias: str, model: str | None) -> None:
    """Write an alias, or remove it. Who calls has checked that the model is there.

    Raises:
        GryphonError: "usage" for what cannot be an alias, "invalid_setting", "no_write_permission".
    """
    if not ALIAS.fullmatch(alias):
        raise GryphonError(
            "usage",
            "An alias is letters, digits, '.', '_', ':' and '-', 64 at most, and begins with a "
            f"letter or a digit, got {alias!r}.",
        )
    _edit(_TABLE, alias, model)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):  # a home that is a file is told of by others
        return ""
    except OSError as error:
        raise _invalid(path, f"it cannot be read ({error.strerror or error})") from error
    if len(data) > _MAX_BYTES:
        raise _invalid(path, f"it has more than {_MAX_BYTES:,} bytes")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _invalid(path, f"it is not UTF-8 text ({error})") from error


def _parse(path: Path, text: str) -> Stored:
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _invalid(path, f"it is not TOML: {error}") from error
    known = ("keep_alive", "default_model", _TABLE)
    for key in values:
        if key not in known:
            raise _wrong(path, text, None, key, f"is no setting; there are {', '.join(known)}")
    return Stored(
        keep_alive_s=_seconds(path, text, values),
        default_model=_name(path, text, None, "default_model", values),
        aliases=_aliases(path, text, values.get(_TABLE, {})),
    )


def _seconds(path: Path, text: str, values: Mapping[str, Any]) -> float | None:
    value = values.get("keep_alive")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        what = f"must be a number of seconds, negative for ever, got {value!r}"
        raise _wrong(path, text, None, "keep_alive", what)
    return float(value)


def _aliases(path: Path, text: str, table: Any) -> dict[str, str]:
    if not isinstance(table, dict):
        raise _wrong(path, text, None, _TABLE, f"must be a table of names, got {table!r}")
    for alias in table:
        if not ALIAS.fullmatch(alias):
            what = "cannot be an alias: letters, digits, '.', '_', ':' and '-', 64 at most"
            raise _wrong(path, text, _TABLE, alias, what)
    return {alias: _name(path, text, _TABLE, alias, table) or "" for alias in table}


def _name(
    path: Path, text: str, table: str | None, key: str, values: Mapping[str, Any]
) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _MAX_NAME:
        raise _wrong(path, text, table, key, f"must be the name of a model, got {value!r}")
    return value


def _edit(table: str | None, key: str, value: str | None) -> None:
    path = paths.config_dir() / paths.settings_file().name
    try:
        with locked(path.with_name(f".{path.name}.lock"), lambda: None):
            before = _text(path)
            _parse(path, before)  # a file that is wrong is mended by its owner, not overwritten
            expected = tomllib.loads(before)
            place = expected if table is None else expected.setdefault(table, {})
            if value is None:
                place.pop(key, None)
            else:
                place[key] = value
            after = _edited(before, table, key, value)
            if after is None or not _says(after, expected):
                what = f"{key} = {_quoted(value)}" if value is not None else f"no {key}"
                where = f" under [{table}]" if table else ""
                raise _invalid(path, f"{key} cannot be changed in it; write {what}{where} yourself")
            _replace(path, after)
    except OSError as error:
        raise GryphonError(
            "no_write_permission",
            f"Gryphon cannot write {path}: {error.strerror or error}. Make it writable, or set "
            "GRYPHON_HOME to a directory you own.",
        ) from error


def _says(text: str, expected: dict[str, Any]) -> bool:
    """Whether it is these settings; a table without entries is none."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return {k: v for k, v in found.items() if v != {}} == {
        k: v for k, v in expected.items() if v != {}
    }


def _edited(text: str, table: str | None, key: str, value: str | None) -> str | None:
    """The text with one line changed, added or removed; None where that cannot be done."""
    lines = text.split("\n")
    here = [(number, found) for number, found in _pairs(lines) if found[0] == table]
    for number, (_, name) in here:
        if name != key:
            continue
        if value is None:
            return "\n".join([*lines[:number], *lines[number + 1 :]])
        pair = _PAIR.match(lines[number])
        rest = _VALUE.match(pair[5]) if pair else None
        if pair is None or rest is None:
            return None
        lines[number] = f"{pair[1]}{_quoted(value)}{rest[2]}"
        return "\n".join(lines)
    if value is None:
        return text
    line = f"{key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else _quoted(key)} = {_quoted(value)}"
    at = _place_for(lines, table, [number for number, _ in here])
    if at is None:
        head = text.rstrip("\n")
        return f"{head}\n\n[{table}]\n{line}\n" if head else f"[{table}]\n{line}\n"
    return "\n".join([*lines[:at], line, *lines[at:]])


def _place_for(lines: list[str], table: str | None, pairs: list[int]) -> int | None:
    """The line before which a new key belongs; None if its table is not there."""
    if pairs:
        return pairs[-1] + 1
    headers = {
        found[1]: number for number, line in enumerate(lines) if (found := _HEADER.match(line))
    }
    if table is not None:
        return headers[table] + 1 if table in headers else None
    at = min(headers.values(), default=len(lines) - (lines[-1] == ""))
    while headers and at > 0 and lines[at - 1].lstrip().startswith("#"):
        at -= 1  # what is said of the table stays with it
    return at


def _pairs(lines: list[str]) -> Iterator[tuple[int, tuple[str | None, str]]]:
    """Line number, table and key of every line that looks like KEY = VALUE."""
    table: str | None = None
    for number, line in enumerate(lines):
        if header := _HEADER.match(line):
            table = header[1]
        elif pair := _PAIR.match(line):
            yield number, (table, pair[2] or pair[3] or pair[4] or "")


def _line_of(text: str, table: str | None, key: str) -> int | None:
    lines = text.split("\n")
    for number, found in _pairs(lines):
        if found == (table, key):
            return number + 1
    for number, line in enumerate(lines):
        if re.match(rf"\s*\[*\s*['\"]?{re.escape(key)}['\"]?\s*[\].=]", line):
            return number + 1
    return None


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's are a part of them, for text that can be printed."""
    return json.dumps(text, ensure_ascii=False)


def _replace(path: Path, text: str) -> None:
    """Write it all or nothing; a link stays one."""
    target = path.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _wrong(path: Path, text: str, table: str | None, key: str, why: str) -> GryphonError:
    line = _line_of(text, table, key)
    where = f"line {line}: " if line else ""
    return _invalid(path, f"{where}{key[:100]!r} {why}")


def _invalid(path: Path, why: str) -> GryphonError:
    return GryphonError("invalid_setting", f"{path}: {why}.")
