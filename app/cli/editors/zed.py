"""Zed. Keys: https://zed.dev/docs/ai/use-api-access#openai-compatible; the file:
https://zed.dev/docs/configuring-zed."""

from __future__ import annotations

from app.cli.config_text import jsonc, puts
from app.cli.editors.configuration import (
    Configuration,
    ServedModel,
    SettingsFile,
    Setup,
    key_note,
    tools_note,
)

# Zed makes the name of the key's variable from it: GRYPHON_API_KEY.
_PROVIDER = "gryphon"


def configure(setup: Setup) -> Configuration:
    """A provider of the OpenAI-compatible kind, in the one settings file that Zed has."""
    provider = {
        "api_url": setup.endpoint.openai_url,
        "available_models": [_model(one) for one in setup.models],
    }
    place = ("language_models", "openai_compatible", _PROVIDER)
    key_how = (
        "agent: open settings, LLM Providers, gryphon asks for it and keeps it in the keychain; "
        "or start Zed with GRYPHON_API_KEY in its environment."
    )
    without_key = "Zed wants a key for every provider: enter any word, for example gryphon."
    return Configuration(
        title="Zed",
        files=[
            SettingsFile(
                setup.places.xdg_config / "zed" / "settings.json", jsonc, puts(place, provider)
            )
        ],
        steps=[
            "Choose one of the models in the agent panel.",
            *([] if setup.endpoint.needs_key else [without_key]),
        ],
        # Zed reads no key from its settings, so that one asked for is told, never written.
        notes=[*key_note(setup, key_how), *tools_note(setup)],
    )


def _model(model: ServedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "display_name": f"{model.name} (Gryphon)",
        "max_tokens": model.context,
        "capabilities": {
            "tools": model.has_tools,
            "images": False,
            "parallel_tool_calls": False,
            "prompt_cache_key": False,
        },
    }
