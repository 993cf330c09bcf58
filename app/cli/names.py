"""`gryphon use` and `gryphon alias`: the default model, and other names for models."""

from __future__ import annotations

import argparse
import json
import sys

from app.cli.terminal import one_line, table
from app.errors import GryphonError
from app.library import aliases as library
from app.library.installed import aliases, default_setting, find_model, installed_models
from app.settings import Settings
from app.settings_file import set_default_model


def use(arguments: argparse.Namespace) -> int:
    """Set the default model, or say which it is."""
    if arguments.unset:
        if arguments.name is not None:
            raise GryphonError("usage", "--unset takes no model.")
        set_default_model(None)
    elif arguments.name is not None:
        library.use(arguments.name)
    overruled = Settings.from_environment().default_model
    if overruled and (arguments.unset or arguments.name is not None):
        print(f"gryphon: GRYPHON_MODEL={overruled} wins over it while it is set.", file=sys.stderr)
    _say_default(as_json=arguments.json)
    return 0


def _say_default(*, as_json: bool) -> None:
    """Print the model that is used when none is named, and why."""
    setting = default_setting()
    try:
        name = find_model().name
    except GryphonError as error:
        if error.code != "no_model_installed":
            raise
        name = None
    if as_json:
        where = None if setting is None else setting[1]
        print(json.dumps({"default": name, "set_in": where}))
    elif setting is not None:
        print(f"{one_line(str(name))} is used when no model is named ({setting[1]}).")
    elif name is None:
        print("No default model is set, and no model is installed.")
    else:
        print(f"{one_line(name)} is used when no model is named; no default is set.")


def alias(arguments: argparse.Namespace) -> int:
    """Add, remove or list aliases."""
    if arguments.rm is not None:
        if arguments.name is not None:
            raise GryphonError("usage", "--rm takes the alias alone.")
        print(f"{arguments.rm} no longer stands for {one_line(library.remove(arguments.rm))}.")
    elif arguments.name is None:
        _list(as_json=arguments.json)
    elif arguments.model is None:
        raise GryphonError(
            "usage",
            f"Which model? gryphon alias {arguments.name} MODEL, as `gryphon list` names it.",
        )
    else:
        before = aliases().get(arguments.name)
        model = library.add(arguments.name, arguments.model)
        now = "now " if before not in (None, model.name) else ""
        was = f"; it stood for {one_line(before)}" if before not in (None, model.name) else ""
        print(f"{arguments.name} {now}stands for {one_line(model.name)}{was}.")
    return 0


def _list(*, as_json: bool) -> None:
    here = {model.name for model in installed_models()}
    found = sorted(aliases().items())
    if as_json:
        fields = [
            {"alias": alias, "model": target, "installed": target in here}
            for alias, target in found
        ]
        print(json.dumps(fields, indent=2))
    elif not found:
        print("No alias is set. `gryphon alias NAME MODEL` lets NAME stand for an installed model.")
    else:
        rows = [
            (alias, target, "hidden by a model of that name" if alias in here
             else "" if target in here else "not installed")
            for alias, target in found
        ]  # fmt: skip
        print(table(["ALIAS", "MODEL", ""], rows))
