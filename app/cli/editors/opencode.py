"""OpenCode. Keys: https://opencode.ai/v1/docs/providers (custom provider) and
https://opencode.ai/v1/docs/config (the file, {env:NAME}). Version 2 reads the same file
(https://opencode.ai/docs/migrate-v1), but not both spellings in one."""

from __future__ import annotations

from app.cli.config_text import Put, jsonc, puts
from app.cli.editors.configuration import (
    KEY_VARIABLE,
    Configuration,
    SettingsFile,
    Setup,
    key_note,
    quoted,
    tools_note,
)

_PROVIDER = "gryphon"


def configure(setup: Setup) -> Configuration:
    """A provider with its models, by version 1's names, which version 2 reads too."""
    directory = setup.places.xdg_config / "opencode"
    with_comments = directory / "opencode.jsonc"
    path = with_comments if with_comments.exists() else directory / "opencode.json"
    options = {
        "baseURL": setup.endpoint.openai_url,
        "apiKey": setup.endpoint.key(f"{{env:{KEY_VARIABLE}}}"),
    }
    models = {
        model.name: {
            "name": f"{model.name} (Gryphon)",
            "tool_call": model.has_tools,
            "limit": {"context": model.context, "output": model.output},
        }
        for model in setup.models
    }
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "Gryphon", "options": options}
    wanted = [
        Put(("$schema",), "https://opencode.ai/config.json", only_if_absent=True),
        *puts(("provider", _PROVIDER), provider | {"models": models}),
    ]
    native = (
        'it names its providers as OpenCode 2 does ("providers"), which cannot stand beside '
        '"provider". Add Gryphon there by hand: package aisdk:@ai-sdk/openai-compatible, '
        f"settings.baseURL {setup.endpoint.openai_url}."
    )
    return Configuration(
        title="OpenCode",
        files=[SettingsFile(path, jsonc, wanted, refused_with=[("providers", native)])],
        command=[f"opencode --model {quoted(f'{_PROVIDER}/{setup.model.name}')}"],
        steps=["Or choose a model with /models."],
        notes=[
            *key_note(setup, f"{KEY_VARIABLE} must be in the environment of opencode."),
            *tools_note(setup),
        ],
    )
