"""aider. Keys: https://aider.chat/docs/config/aider_conf.html,
https://aider.chat/docs/llms/openai-compat.html (the prefix openai/), and
https://aider.chat/docs/config/adv-model-settings.html (context sizes)."""

from __future__ import annotations

from app.cli.config_text import Put, jsonc, puts, yaml_text
from app.cli.editors.configuration import (
    Configuration,
    ServedModel,
    SettingsFile,
    Setup,
    key_note,
    quoted,
)


def configure(setup: Setup) -> Configuration:
    """Its home-wide settings and, beside them, what it should know of each model."""
    endpoint, home = setup.endpoint, setup.places.home
    model = f"openai/{setup.model.name}"
    settings = [Put(("openai-api-base",), endpoint.openai_url), Put(("model",), model)]
    key = endpoint.key(None)
    if key is not None:
        asked_for = endpoint.shown_key is not None
        settings.insert(1, Put(("openai-api-key",), key, only_if_absent=not asked_for))
    metadata = [put for one in setup.models for put in puts((f"openai/{one.name}",), _facts(one))]
    return Configuration(
        title="aider",
        files=[
            SettingsFile(home / ".aider.conf.yml", yaml_text, settings),
            SettingsFile(home / ".aider.model.metadata.json", jsonc, metadata),
        ],
        command=[
            f"aider --openai-api-base {endpoint.openai_url} "
            f"--openai-api-key {_key_word(setup)} --model {quoted(model)}"
        ],
        notes=[
            *key_note(setup, 'export OPENAI_API_KEY="$GRYPHON_API_KEY" before starting aider.'),
            "The files make it aider's default everywhere; the command is for one time.",
        ],
    )


def _key_word(setup: Setup) -> str:
    key = setup.endpoint.key(None)
    return '"$GRYPHON_API_KEY"' if key is None else quoted(key)


def _facts(model: ServedModel) -> dict[str, object]:
    return {
        "max_input_tokens": model.context,
        "max_output_tokens": model.output,
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
