"""Files with chats, read into the history."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import NoReturn

from app.errors import GryphonError
from app.history import incoming
from app.history.foreign_json import Place
from app.history.formats import chats_in
from app.history.incoming import ImportResult
from app.history.store import History

MAX_IMPORT_BYTES = 512 * 1024 * 1024
"""Of JSON. Reading it takes several times as much memory."""

_IN_ARCHIVE = re.compile(r"(.*/)?conversations(-\d+)?\.json")


def import_chats(history: History, path: Path) -> ImportResult:
    """Add the chats of a file: our own JSON export, ChatGPT's (the archive or its
    conversations.json), or messages as OpenAI's and Ollama's APIs take them. Chats that were
    imported from it before are left as they are. All come in, or none.

    Raises:
        GryphonError: "import_unreadable" (no such file, too large, no JSON), "invalid_import" with
            the place of what is wrong, or as `History` says.
    """
    try:
        chats = [chat for document in _documents(path) for chat in chats_in(document)]
    except RecursionError as error:
        raise _unreadable(f"{path.name} is nested too deeply to be chats.") from error
    return incoming.store(history, chats)


def _documents(path: Path) -> list[Place]:
    try:
        if not zipfile.is_zipfile(path):
            if path.stat().st_size > MAX_IMPORT_BYTES:
                raise _too_large(path.name)
            return [_parsed(path.read_bytes(), path.name)]
        with zipfile.ZipFile(path) as archive:
            names = sorted(filter(_IN_ARCHIVE.fullmatch, archive.namelist()))
            if not names:
                raise _unreadable(f"{path.name} is an archive without a conversations.json.")
            left, documents = MAX_IMPORT_BYTES, []
            for name in names:
                with archive.open(name) as file:
                    content = file.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise _too_large(path.name)
                documents.append(_parsed(content, name))
            return documents
    except RecursionError:
        raise  # a RuntimeError, as a password would be
    except OSError as error:
        raise _unreadable(f"{path} cannot be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _unreadable(f"{path.name} is a damaged or encrypted archive ({error}).") from error


def _parsed(content: bytes, name: str) -> Place:
    try:
        return Place(json.loads(content, parse_constant=_no_constant), name)
    except ValueError as error:
        raise _unreadable(f"{name} is not JSON: {error}.") from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _too_large(name: str) -> GryphonError:
    return _unreadable(
        f"{name} holds more than {MAX_IMPORT_BYTES // 1024**2} MiB of JSON. Split it into several "
        "files."
    )


def _unreadable(message: str) -> GryphonError:
    return GryphonError("import_unreadable", f"{message} Nothing was imported.")
