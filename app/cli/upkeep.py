"""`gryphon search`, `verify` and `rm`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from app.cli.terminal import StatusLine, bar, can_ask, confirm, human_bytes, table
from app.errors import GryphonError
from app.library.installed import find_model, find_place, installed_models


def search(arguments: argparse.Namespace) -> int:
    """Print models of the hub."""
    from app.library.hub import Hub
    from app.library.search import search as search_hub

    if arguments.limit < 1:
        raise GryphonError("usage", f"--limit must be at least 1, got {arguments.limit}.")
    with Hub() as hub:
        found = search_hub(hub, arguments.query, min(arguments.limit, 100))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
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
                "installed" if one.name in here else "gated" if one.gated else "",
            )
            for one in found
        ]
        print(table(["NAME", "SIZE", "FAMILY", "QUANTIZATION", "DOWNLOADS", ""], rows))
        print("\n`gryphon pull NAME` fetches one.")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Read every file of a model and compare it with its digest; exit status 1 for damage."""
    from app.library.transfer import file_error
    from app.library.verification import verify as verify_model

    # Not `find_model` alone: one that is damaged cannot be read as a model.
    place = find_place(arguments.name) if arguments.name else None
    if place is None:
        model = find_model(arguments.name, allow_path=True)
        place = model.path, model.name, model.source
    path, name, source = place
    line = StatusLine()
    try:
        checks = verify_model(
            path, lambda done, total: line.show(f"{name}: reading {bar(done, total)}")
        )
    except OSError as error:
        raise file_error(path, name, error) from error
    finally:
        line.clear()
    damaged = [check for check in checks if check.problem is not None]
    repairable = bool(damaged) and source == "hub"
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
    if repairable and arguments.repair:
        for check in damaged:
            if check.blob is not None:
                check.blob.unlink(missing_ok=True)
        return _fetch_again(name, path.name, arguments)
    if repairable and not arguments.json:
        print(f"`gryphon verify --repair {name}` fetches what is damaged again.")
    return 1 if damaged else 0


def _fetch_again(name: str, commit: str, arguments: argparse.Namespace) -> int:
    """Pull the very commit that is installed."""
    from app.cli.pull import pull

    words = argparse.Namespace(
        name=name.partition("@")[0],
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
    else:
        if not arguments.yes:
            if not can_ask():
                raise GryphonError(
                    "usage", f"Removing {removal.name} needs --yes where nobody can be asked."
                )
            if not confirm(f"Remove {what}{removal.name}, which frees {frees}?", default=False):
                raise GryphonError("declined", "Nothing was removed.")
        removal.execute()
        if not arguments.json:
            print(f"Removed {what}{removal.name}: {frees} are free again.")
    if arguments.json:
        print(
            json.dumps(
                {
                    "name": removal.name,
                    "path": str(removal.path),
                    "freed_bytes": removal.freed_bytes,
                    "unfinished": removal.unfinished,
                    "removed": not arguments.dry_run,
                }
            )
        )
    sys.stdout.flush()
    return 0
