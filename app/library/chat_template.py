"""The chat template of a model directory, as text; nothing of it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def chat_template(path: Path) -> str:
    """The default one, from a file of its own or tokenizer_config.json; "" for a base model."""
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    for name in ("tokenizer_config.json", "chat_template.json"):
        if text := _default(_settings(path / name).get("chat_template")):
            return text
    return ""


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _default(value: Any) -> str:
    """A template, or the one named default of a list of {"name", "template"}."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
