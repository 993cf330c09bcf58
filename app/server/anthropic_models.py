"""Installed models as Anthropic lists them."""

from __future__ import annotations

from typing import Any

from app.library.installed import InstalledModel
from app.server.timestamp import timestamp


def model_object(model: InstalledModel) -> dict[str, Any]:
    """One model in Anthropic's shape."""
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": timestamp(model.modified),
        "max_input_tokens": model.context_length,
        "lifecycle": "active",
    }


def models_page(models: list[InstalledModel]) -> dict[str, Any]:
    """All of them, as the one page that there is."""
    return {
        "data": [model_object(model) for model in models],
        "has_more": False,
        "first_id": models[0].name if models else None,
        "last_id": models[-1].name if models else None,
    }
