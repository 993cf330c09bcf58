"""Codex. Keys: https://developers.openai.com/codex/config-advanced (custom providers, and profiles,
which are files of their own since 0.134) and https://developers.openai.com/codex/config-reference.

It speaks the Responses API alone (`wire_api`).
"""

from __future__ import annotations

from app.cli.config_text import Put, puts, toml_text
from app.cli.editors.configuration import (
    KEY_VARIABLE,
    Configuration,
    SettingsFile,
    Setup,
    key_note,
    tools_note,
)

_NAME = "gryphon"


def configure(setup: Setup) -> Configuration:
    """A provider, and a profile that chooses it, so that the user's default stays."""
    endpoint, model = setup.endpoint, setup.model
    provider: dict[str, object] = {
        "name": "Gryphon",
        "base_url": endpoint.openai_url,
        "wire_api": "responses",
    }
    if endpoint.shown_key is not None:
        provider["experimental_bearer_token"] = endpoint.shown_key
    elif endpoint.needs_key:
        provider["env_key"] = KEY_VARIABLE
    profile = [Put(("model",), model.name), Put(("model_provider",), _NAME)]
    if model.context_length is not None:
        profile.append(Put(("model_context_window",), model.context_length))
    directory = setup.places.codex
    return Configuration(
        title="Codex",
        files=[
            SettingsFile(
                directory / "config.toml", toml_text, puts(("model_providers", _NAME), provider)
            ),
            SettingsFile(directory / f"{_NAME}.config.toml", toml_text, profile),
        ],
        command=[f"codex --profile {_NAME}"],
        notes=[
            *key_note(setup, f"{KEY_VARIABLE} must be in the environment of codex."),
            "Codex warns that it does not know the model; that does no harm.",
            *tools_note(setup),
        ],
    )
