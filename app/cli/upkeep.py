"""`gryphon search`, `verify` and `rm`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.terminal import StatusLine, bar, can_ask, confirm, human_bytes, table
from app.errors import GryphonError
from app.library import adapters
from app.library.installed import Source, find_model, find_place, installed_models

if TYPE_CHECKING:
    from app.library.fit import Fit
    from app.library.verification import FileCheck


def search(arguments: argparse.Namespace) -> int:
    """Print models of the hub."""
    from app.cli.fit import current_budget
    from app.library.hub import Hub
    from app.library.search import fits
    from app.library.search import search as search_hub

    if arguments.limit < 1:
        raise GryphonError("usage", f"--limit must be at least 1, got {arguments.limit}.")
    line = StatusLine()
    budget = current_budget()
    with Hub(tell=line.show) as hub:
        line.show("asking the hub")
        try:
            found = search_hub(hub, arguments.query, min(arguments.limit, 100))
            line.show("reading what the models need")
            verdicts = fits(hub, found, budget)
        finally:
            line.clear()
    if arguments.json:
        fields = [
            dataclasses.asdict(one)
            | {
                "verdict": None if fit is None else fit.verdict,
                "largest_context": None if fit is None else fit.largest_context,
            }
            for one, fit in zip(found, verdicts, strict=True)
        ]
        print(json.dumps(fields, indent=2))
    elif not found:
        print(f"The hub has nothing that runs here under {arguments.query!r}. Try fewer words.")
    else:
        here = {model.name for model in installed_models()}
        rows = [
            (
                one.name,
                human_bytes(one.weight_bytes),
                one.family,
                one.quantization,
                str(one.downloads),
                _fits(fit, one.weight_bytes > budget.bytes),
                "installed" if one.name in here else "gated" if one.gated else "",
            )
            for one, fit in zip(found, verdicts, strict=True)
        ]
        print(table(["NAME", "SIZE", "FAMILY", "QUANTIZATION", "DOWNLOADS", "FITS", ""], rows))
        print(
            "\nFITS: the longest context here, about. `gryphon pull --dry-run NAME` has the "
            "arithmetic,\nand `gryphon pull NAME` fetches one."
        )
    return 0


def _fits(fit: Fit | None, is_too_large: bool) -> str:
    if is_too_large or (fit is not None and fit.verdict == "does not fit"):
        return "no"
    if fit is None:
        return "?"
    context = "any" if fit.largest_context is None else f"{fit.largest_context} tokens"
    return context if fit.verdict == "fits" else f"{context}, slowly"


def verify(arguments: argparse.Namespace) -> int:
    """Read every file of a model and compare it with its digest; exit status 1 for damage."""
    from app.library.transfer import file_error
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
    repairable = source == "hub" and any(check.path.parent == path for check in damaged)
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
        return _repair(base, path, [one for one in damaged if one.path.parent == path], arguments)
    if repairable and not arguments.json:
        print(f"`gryphon verify --repair {base}` fetches what is damaged again.")
    return 1 if damaged else 0


def _parts(name: str | None) -> tuple[Path, str, Source, Path | None]:
    """Directory, name and source of a model, and the directory of the adapter on it.

    Not `find_model` alone: one that is damaged cannot be read as a model.
    """
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
            _tell_adapters(removal.needed_by)
    else:
        if not arguments.yes:
            _tell_adapters(removal.needed_by)
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
                _tell_adapters(removal.needed_by)
    if arguments.json:
        print(
            json.dumps(
                {
                    "name": removal.name,
                    "path": str(removal.path),
                    "freed_bytes": removal.freed_bytes,
                    "unfinished": removal.unfinished,
                    "needed_by": removal.needed_by,
                    "removed": not arguments.dry_run,
                }
            )
        )
    sys.stdout.flush()
    return 0


def _tell_adapters(names: tuple[str, ...]) -> None:
    if names:
        print(
            f"It is the base of the adapters {', '.join(names)}: they stay, and are of no use "
            "without it.",
            file=sys.stderr,
        )
