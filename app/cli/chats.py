"""`gryphon chats`: the history without the terminal chat."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from app import paths
from app.cli.terminal import can_ask, confirm, one_line, table
from app.engine.client import EngineClient
from app.errors import GryphonError
from app.history.export import as_json, as_markdown
from app.history.forgetting import forget_deleted
from app.history.importing import import_chats
from app.history.records import Conversation, SearchHit, Snippet
from app.history.search import search
from app.history.store import History
from app.printable import printable


def chats(arguments: argparse.Namespace) -> int:
    """Carry out one of its actions."""
    actions = {
        "list": _list,
        "search": _search,
        "show": _show,
        "export": _export,
        "import": _import,
        "rm": _remove,
    }
    with closing(History(paths.history_path())) as history:
        if history.notice:
            print(f"gryphon: {one_line(history.notice)}", file=sys.stderr)
        actions[arguments.action or "list"](history, arguments)
    return 0


def _list(history: History, arguments: argparse.Namespace) -> None:
    if arguments.limit < 0:
        raise GryphonError("usage", f"--limit must be at least 0, got {arguments.limit}.")
    found = history.conversations(
        folder=arguments.folder, pinned_first=True, limit=arguments.limit or None
    )
    if arguments.json:
        print(json.dumps([_fields(one) for one in found], indent=2))
    elif not found:
        print(
            "No chats yet. `gryphon` opens one."
            if arguments.folder is None
            else f"No chat is in the folder {one_line(arguments.folder)!r}."
        )
    else:
        rows = [
            (
                str(one.id),
                ("* " if one.pinned else "") + (one.title or "(no title)"),
                str(one.messages),
                one.folder,
                one.model,
                _when(one.updated),
            )
            for one in found
        ]
        print(table(["CHAT", "TITLE", "MESSAGES", "FOLDER", "MODEL", "LAST USED"], rows))


def _search(history: History, arguments: argparse.Namespace) -> None:
    if arguments.limit < 1:
        raise GryphonError("usage", f"--limit must be at least 1, got {arguments.limit}.")
    hits = search(history, " ".join(arguments.words), limit=arguments.limit)
    if arguments.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
    elif not hits:
        print("Nothing found.")
    for hit in hits if not arguments.json else ():
        _print_hit(hit)


def _print_hit(hit: SearchHit) -> None:
    if hit.message is None:
        print(f"{hit.conversation}  {_marked(hit.snippet)}")
    else:
        title = one_line(hit.title or "(no title)")
        print(f"{hit.conversation}  {title} · {hit.role}, {_when(hit.created)}")
        print(f"    {_marked(hit.snippet)}")


def _marked(snippet: Snippet) -> str:
    """The snippet with its hits bold on a terminal, in brackets elsewhere."""
    left, right = ("\x1b[1m", "\x1b[22m") if sys.stdout.isatty() else ("[", "]")
    parts, end = [], 0
    for start, stop in snippet.marks:
        parts += [one_line(snippet.text[end:start]), left]
        parts += [one_line(snippet.text[start:stop]), right]
        end = stop
    return "".join([*parts, one_line(snippet.text[end:])])


def _show(history: History, arguments: argparse.Namespace) -> None:
    if arguments.json:
        # The document of an export, which knows how to write everything of a chat.
        document = json.loads("".join(as_json(history, [arguments.chat])))
        print(json.dumps(document["chats"][0], indent=2))
    else:
        text = as_markdown(history, arguments.chat)
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)


def _export(history: History, arguments: argparse.Namespace) -> None:
    numbers = arguments.chats or [one.id for one in history.conversations()][::-1]
    for number in numbers:
        history.conversation(number)  # before anything is written: are they all there?
    pieces: Iterable[str]
    if arguments.format == "json":
        pieces = as_json(history, numbers)
    else:
        pieces = ("\n" * bool(i) + as_markdown(history, one) for i, one in enumerate(numbers))
    if arguments.output is None:
        for piece in pieces:
            sys.stdout.write(piece)
        return
    _write(arguments.output, pieces)
    if arguments.json:
        print(json.dumps({"chats": len(numbers), "file": str(arguments.output)}))
    else:
        print(f"{_count(len(numbers), 'chat')} in {arguments.output}.")


def _write(path: Path, pieces: Iterable[str]) -> None:
    """Write a new private file, whole or not at all."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise GryphonError(
            "file_exists", f"{path} is there already. Remove it, or name another file."
        ) from error
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        with open(file, "w", encoding="utf-8") as out:
            out.writelines(pieces)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _not_written(path, error) from error
        raise


def _not_written(path: Path, error: OSError) -> GryphonError:
    return GryphonError("not_written", f"{path} cannot be written: {error.strerror or error}.")


def _import(history: History, arguments: argparse.Namespace) -> None:
    result = import_chats(history, arguments.file)
    if arguments.json:
        print(json.dumps(asdict(result)))
        return
    print(f"Imported {_count(len(result.conversations), 'chat')}.")
    if result.already_here:
        print(f"{_count(result.already_here, 'chat')} had been imported before.")
    if result.left_out:
        print(f"{_count(result.left_out, 'part')} had no text, such as images, and stayed out.")


def _remove(history: History, arguments: argparse.Namespace) -> None:
    found = [history.conversation(number) for number in dict.fromkeys(arguments.chats)]
    if not arguments.yes:
        if not can_ask():
            raise GryphonError("usage", "Removing chats needs --yes where nobody can be asked.")
        for one in found:
            print(f"{one.id}  {one_line(one.title or '(no title)')}", file=sys.stderr)
        question = f"Remove {_count(len(found), 'chat')} for good?"
        if not confirm(question, default=False):
            raise GryphonError("declined", "Nothing was removed.")
    try:
        for one in found:
            history.delete_conversation(one.id)
    finally:
        asyncio.run(_forget(history))
    if arguments.json:
        print(json.dumps({"removed": [one.id for one in found]}))
    else:
        print(f"Removed {_count(len(found), 'chat')}, and what the engine kept of them.")


async def _forget(history: History) -> None:
    client = EngineClient()
    try:
        await forget_deleted(history, client.forget_chat)
    finally:
        await client.close()


def _fields(one: Conversation) -> dict[str, Any]:
    return {
        "chat": one.id,
        "uid": one.uid,
        "title": one.title,
        "titled_by": one.titled_by,
        "folder": one.folder,
        "pinned": one.pinned,
        "model": one.model,
        "messages": one.messages,
        "turns": one.turns,
        "created": one.created,
        "updated": one.updated,
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
