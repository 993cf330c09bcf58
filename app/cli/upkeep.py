"""`gryphon verify` and `rm`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.terminal import StatusLine, bar, can_ask, confirm, human_bytes
from app.errors import GryphonError
from app.library import adapters
from app.library.installed import (
    DEFAULT_MODEL,
    Source,
    find_model,
    find_place,
    resolve_alias,
)

if TYPE_CHECKING:
    from app.library.removal import Removal
    from app.library.verification import FileCheck


def verify(arguments: argparse.Namespace) -> int:
    """Read every file of a model and compare it with its digest; exit status 1 for damage."""
    from app.library.disk import file_error
    from app.library.verification import verify as verify_model

    path, name, source, adapter = _parts(arguments.name)
    line = StatusLine()
    try:
        checks = [
            check
            for part in (path, adapter)
            if part is not None
            for check in verify_model(
                part, lambda done, total: line.show(f"{name}: reading {bar(done, total)}")
            )
        ]
    except OSError as error:
        raise file_error(path, name, error) from error
    finally:
        line.clear()
    damaged = [check for check in checks if check.problem is not None]
    repairable = source == "hub" and any(path in check.path.parents for check in damaged)
    if arguments.json:
        files = [
            {"name": check.name, "size": check.size, "digest_known": check.digest_known,
             "problem": check.problem}
            for check in checks
        ]  # fmt: skip
        print(json.dumps({"name": name, "damaged": len(damaged), "files": files}))
    else:
        for check in damaged:
            print(f"{check.name}: {check.problem}")
        known = sum(check.digest_known for check in checks)
        print(
            f"{name}: {len(damaged)} of {len(checks)} files are damaged."
            if damaged
            else f"{name} is whole: {len(checks)} files, {known} compared with their digest."
        )
    base = name if adapter is None else name.rpartition("+")[0]
    if repairable and arguments.repair:
        return _repair(base, path, [one for one in damaged if path in one.path.parents], arguments)
    if damaged and not arguments.json:
        if repairable:
            print(f"`gryphon verify --repair {base}` fetches what is damaged again.")
        elif base == DEFAULT_MODEL:
            print(f"`gryphon rm {base}` and `gryphon pull {base}` fetch it anew.")
    return 1 if damaged else 0


def _parts(name: str | None) -> tuple[Path, str, Source, Path | None]:
    """Directory, name and source of a model, and the directory of the adapter on it.

    Not `find_model` alone: one that is damaged cannot be read as a model.
    """
    name = resolve_alias(name) if name else None
    adapter = adapters.find_directory(name) if name else None
    place = find_place(adapter[1] if adapter else name) if name else None
    if place is None:
        model = find_model(name, allow_path=True)
        return model.path, model.name, model.source, model.adapter
    path, found, source = place
    return path, name or found, source, adapter[0] if adapter else None


def _repair(
    name: str, snapshot: Path, damaged: list[FileCheck], arguments: argparse.Namespace
) -> int:
    """Pull the very commit that is installed, without what is damaged of it."""
    from app.cli.pull import pull
    from app.library.hub import Hub

    repository, commit = name.partition("@")[0], snapshot.name
    with Hub() as hub:
        hub.repository(repository, commit)  # before anything is removed: is it still there?
    for check in damaged:
        (check.path if check.blob is None else check.blob).unlink(missing_ok=True)
    words = argparse.Namespace(
        name=repository,
        revision=commit,
        yes=True,
        dry_run=False,
        json=arguments.json,
    )
    return pull(words)


def remove(arguments: argparse.Namespace) -> int:
    """Remove a model, after saying what that frees."""
    from app.library.removal import plan_removal

    removal = plan_removal(arguments.name)
    what = "an unfinished pull of " if removal.unfinished else ""
    frees = human_bytes(removal.freed_bytes)
    if arguments.dry_run:
        if not arguments.json:
            print(f"Would remove {what}{removal.name}, which frees {frees}: {removal.path}")
            _tell_what_needs_it(removal)
    else:
        if not arguments.yes:
            _tell_what_needs_it(removal)
            if not can_ask():
                raise GryphonError(
                    "usage", f"Removing {removal.name} needs --yes where nobody can be asked."
                )
            if not confirm(f"Remove {what}{removal.name}, which frees {frees}?", default=False):
                raise GryphonError("declined", "Nothing was removed.")
        removal.execute()
        if not arguments.json:
            print(f"Removed {what}{removal.name}: {frees} are free again.")
            if arguments.yes:
                _tell_what_needs_it(removal)
    if arguments.json:
        print(
            json.dumps(
                {
                    "name": removal.name,
                    "path": str(removal.path),
                    "freed_bytes": removal.freed_bytes,
                    "unfinished": removal.unfinished,
                    "needed_by": removal.needed_by,
                    "named_by": removal.named_by,
                    "removed": not arguments.dry_run,
                }
            )
        )
    sys.stdout.flush()
    return 0


def _tell_what_needs_it(removal: Removal) -> None:
    if removal.needed_by:
        print(
            f"It is the base of the adapters {', '.join(removal.needed_by)}: they stay, and are of "
            "no use without it.",
            file=sys.stderr,
        )
    if removal.named_by:
        print(
            f"It is {' and '.join(removal.named_by)}: choose another with `gryphon use` and "
            "`gryphon alias`.",
            file=sys.stderr,
        )
