"""`gryphon editor`: what an editor has to be told to use this machine's models."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse
from collections.abc import Sequence

from app.cli import DEFAULT_PORT
from app.cli.config_file import Change, planned, write
from app.cli.editors import configure
from app.cli.editors.configuration import (
    Configuration,
    Endpoint,
    Places,
    ServedModel,
    Setup,
)
from app.cli.terminal import can_ask, confirm
from app.errors import GryphonError
from app.library.details import mentions_tools
from app.library.installed import InstalledModel, find_model, installed_models
from app.printable import printable
from app.server.announcement import running_endpoints
from app.settings import Settings

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that a server listens on and nobody can call, to ones that lead there."""


def editor(arguments: argparse.Namespace) -> int:
    """Print the configuration of an editor, or write it."""
    endpoint = _endpoint(arguments.port, show_key=arguments.show_key)
    setup = Setup(endpoint, _models(arguments.model), Places.here())
    wanted = configure(arguments.name, setup)
    if arguments.write:
        _write(wanted, yes=arguments.yes, as_json=arguments.json)
    elif arguments.json:
        print(json.dumps(_as_json(wanted, setup), indent=2))
    else:
        print("\n".join(_described(wanted, setup)))
    return 0


def _endpoint(port: int | None, *, show_key: bool) -> Endpoint:
    if port is not None and not 0 < port <= 65535:
        raise GryphonError("usage", f"--port should be 1 to 65535, got {port}.")
    running = running_endpoints()
    if port is not None:
        running = [one for one in running if urllib.parse.urlsplit(one.url).port == port]
    key = Settings.from_environment().api_key
    needs_key = running[0].has_key if running else key is not None
    if show_key and needs_key and key is None:
        raise GryphonError(
            "no_api_key",
            "The endpoint's key is not known here: --show-key needs it in GRYPHON_API_KEY.",
        )
    return Endpoint(
        url=_callable(running[0].url) if running else f"http://127.0.0.1:{port or DEFAULT_PORT}",
        is_running=bool(running),
        needs_key=needs_key,
        shown_key=key if show_key and needs_key else None,
    )


def _callable(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    host = _EVERYWHERE.get(parts.hostname or "", parts.hostname or "")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port}"


def _models(name: str | None) -> list[ServedModel]:
    """The named one, or all that are installed, the default one first."""
    default = find_model(name)
    others = [] if name else [one for one in installed_models() if one.name != default.name]
    return [_served(one) for one in (default, *others)]


def _served(model: InstalledModel) -> ServedModel:
    return ServedModel(model.name, model.context_length, mentions_tools(model))


def _described(wanted: Configuration, setup: Setup) -> list[str]:
    lines = [wanted.title, ""]
    for file in wanted.files:
        content = printable(file.edited("")).rstrip("\n")
        lines += [f"{file.path}:", "", content, ""]
    for command in wanted.command:
        lines += [command, ""]
    lines += [f"{number}. {step}" for number, step in enumerate(wanted.steps, 1)]
    lines += [""] if wanted.steps else []
    lines += wanted.notes
    if setup.endpoint.url.startswith("https"):
        lines.append("The endpoint speaks https: the editor has to trust its certificate.")
    if not setup.endpoint.is_running:
        lines.append(f"No endpoint runs at {setup.endpoint.url} now; `{_serve(setup)}` starts one.")
    if wanted.files:
        lines.append("`--write` merges it into what is there.")
    return lines


def _serve(setup: Setup) -> str:
    port = urllib.parse.urlsplit(setup.endpoint.url).port
    return "gryphon serve" if port == DEFAULT_PORT else f"gryphon serve --port {port}"


def _as_json(wanted: Configuration, setup: Setup) -> dict[str, object]:
    return {
        "title": wanted.title,
        "url": setup.endpoint.url,
        "running": setup.endpoint.is_running,
        "files": [{"path": str(one.path), "content": one.edited("")} for one in wanted.files],
        "commands": list(wanted.command),
        "steps": list(wanted.steps),
        "notes": list(wanted.notes),
    }


def _write(wanted: Configuration, *, yes: bool, as_json: bool) -> None:
    if not wanted.files:
        raise GryphonError(
            "nothing_to_write",
            f"{wanted.title} keeps this where no other program can write it; without --write, this "
            "command says what to enter.",
        )
    # All are looked at before any is written.
    found = [planned(file) for file in wanted.files]
    changes = [change for change in found if change is not None]
    report = sys.stderr if as_json else sys.stdout
    for change in changes:
        print(change.diff, file=report)
    if changes and not yes:
        _ask(changes)
    written = []
    for change in changes:
        backup = write(change)
        written.append(
            {"path": str(change.path), "backup": None if backup is None else str(backup)}
        )
        kept = "" if backup is None else f"; as it was: {backup}"
        print(f"Wrote {change.path}{kept}", file=report)
    if as_json:
        print(json.dumps({"written": written}))
    elif not changes:
        print("Nothing to change: it is all there.")
    for line in (*wanted.steps, *wanted.notes) if not as_json else ():
        print(line)


def _ask(changes: Sequence[Change]) -> None:
    sys.stdout.flush()
    if not can_ask():
        raise GryphonError("usage", "Writing needs --yes where nobody can be asked.")
    what = " and ".join(str(change.path) for change in changes)
    if not confirm(f"Write {what}?", default=False):
        raise GryphonError("declined", "Nothing was written.")
