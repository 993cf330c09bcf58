"""`gryphon adapters`: install, list and remove LoRA adapters."""

from __future__ import annotations

import argparse
import json

from app.cli.terminal import human_bytes, table
from app.library import adapters as library
from app.library.installed import installed_models


def adapters(arguments: argparse.Namespace) -> int:
    """Carry out one of its actions."""
    if arguments.action == "add":
        model = library.add(arguments.directory, arguments.name, arguments.base)
        print(f'Installed. Use it as a model: gryphon run -m {model.name} "…"')
    elif arguments.action == "rm":
        library.remove(arguments.name)
        print(f"Removed {arguments.name}.")
    else:
        _list(as_json=arguments.json)
    return 0


def _list(*, as_json: bool) -> None:
    models = {model.name: model for model in installed_models()}
    found = [(name, base, models.get(f"{base}+{name}")) for name, base in library.installed_names()]
    if as_json:
        fields = [
            {"name": name, "base": base, "model": None if model is None else model.name}
            for name, base, model in found
        ]
        print(json.dumps(fields, indent=2))
    elif not found:
        print("No adapter is installed. `gryphon adapters add DIR` installs one made by mlx-lm.")
    else:
        rows = [
            (
                name,
                base,
                "(base not installed, or damaged)" if model is None else model.name,
                "-" if model is None else human_bytes(model.size_bytes),
            )
            for name, base, model in found
        ]
        print(table(["NAME", "BASE", "MODEL", "SIZE WITH BASE"], rows))
