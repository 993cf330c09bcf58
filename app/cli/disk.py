"""`gryphon du` and `gryphon prune`: what lies on the disk, and removing what no model needs."""

from __future__ import annotations

import argparse
import json
import sys

from app.cli.terminal import can_ask, confirm, human_bytes, table
from app.errors import GryphonError
from app.library.leftovers import Leftover, disk_use, leftovers


def du(arguments: argparse.Namespace) -> int:
    """Print what everything takes on the disk."""
    uses, unused = disk_use(), leftovers()
    freed = sum(one.freed_bytes for one in unused)
    total = sum(size for _, size, _ in uses)
    if arguments.json:
        entries = [{"name": name, "bytes": size, "path": str(path)} for name, size, path in uses]
        print(json.dumps({"total_bytes": total, "prunable_bytes": freed, "entries": entries}))
        return 0
    rows = [(human_bytes(size), name, str(path)) for name, size, path in uses if size]
    print(table(["SIZE", "NAME", "PATH"], [*rows, (human_bytes(total), "in all", "")]))
    if unused:
        print(f"\n{human_bytes(freed)} of it no model needs: `gryphon prune` removes that.")
    return 0


def prune(arguments: argparse.Namespace) -> int:
    """Remove what no model needs, after saying what it is."""
    found = leftovers()
    freed = sum(one.freed_bytes for one in found)
    if not arguments.json:
        _describe(found)
    if found and not arguments.dry_run:
        if not arguments.yes:
            if not can_ask():
                raise GryphonError("usage", "Pruning needs --yes where nobody can be asked.")
            question = f"Remove all this, which frees {human_bytes(freed)}?"
            if not confirm(question, default=False):
                raise GryphonError("declined", "Nothing was removed.")
        freed = _remove(found)
        if not arguments.json:
            print(f"Removed: {human_bytes(freed)} are free again.")
    if arguments.json:
        fields = [
            {"name": one.name, "what": one.what, "freed_bytes": one.freed_bytes} for one in found
        ]
        removed = bool(found) and not arguments.dry_run
        print(json.dumps({"freed_bytes": freed, "removed": removed, "leftovers": fields}))
    sys.stdout.flush()
    return 0


def _remove(found: list[Leftover]) -> int:
    """Remove each; returns the bytes that are free again. One that fails does not keep the rest."""
    freed, failure = 0, None
    for one in found:
        try:
            one.remove()
            freed += one.freed_bytes
        except GryphonError as error:
            failure = error
    if failure is not None:
        raise failure
    return freed


def _describe(found: list[Leftover]) -> None:
    if not found:
        print("Nothing to remove: models need all that is here, or it is younger than an hour.")
    for one in found:
        print(f"{one.name}: {one.what}, {human_bytes(one.freed_bytes)}")
