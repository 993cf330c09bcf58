"""Claude Code. Keys: https://code.claude.com/docs/en/settings (`env`, `apiKeyHelper`),
https://code.claude.com/docs/en/llm-gateway (the base URL without /v1) and
https://code.claude.com/docs/en/model-config (the variables that name models)."""

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

_SMALLEST_CONTEXT = 32_768
"""Tokens that its instructions and tools leave little of."""


def configure(setup: Setup) -> Configuration:
    """Variables in the user's settings; one model stands in for every size that it asks for."""
    endpoint, model = setup.endpoint, setup.model
    variables = {
        "ANTHROPIC_BASE_URL": endpoint.url,
        "ANTHROPIC_MODEL": model.name,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model.name,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model.name,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model.name,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(model.output),
        # A line that changes with every request would keep its prompts from being reused.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    }
    wanted = puts(("env",), variables)
    key = endpoint.key(None)
    if key is None:
        wanted.append(Put(("apiKeyHelper",), f"printenv {KEY_VARIABLE}"))
    else:
        wanted.append(Put(("env", "ANTHROPIC_AUTH_TOKEN"), key))
    token = quoted(key) if key is not None else f'"${KEY_VARIABLE}"'
    return Configuration(
        title="Claude Code",
        files=[SettingsFile(setup.places.claude / "settings.json", jsonc, wanted)],
        command=[
            f"ANTHROPIC_BASE_URL={endpoint.url} ANTHROPIC_AUTH_TOKEN={token} "
            f"ANTHROPIC_DEFAULT_HAIKU_MODEL={quoted(model.name)} "
            f"claude --model {quoted(model.name)}"
        ],
        notes=[
            *key_note(setup, f"{KEY_VARIABLE} must be in the environment of claude."),
            "The file turns every session to Gryphon; the command is for one.",
            *_small_note(setup),
            *tools_note(setup),
        ],
    )


def _small_note(setup: Setup) -> list[str]:
    length = setup.model.context_length
    if length is None or length >= _SMALLEST_CONTEXT:
        return []
    return [
        f"{setup.model.name} holds {length} tokens, less than Claude Code's own instructions "
        "need: choose a model with a longer context."
    ]
