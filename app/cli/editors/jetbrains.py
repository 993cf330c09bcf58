"""JetBrains AI Assistant. Clicks: https://www.jetbrains.com/help/ai-assistant/use-custom-models.html.

It keeps providers and keys in a store of its own, so there is no file to write.
"""

from __future__ import annotations

from app.cli.editors.configuration import Configuration, Setup, key_note, tools_note


def configure(setup: Setup) -> Configuration:
    """What to enter in the settings of the IDE."""
    key = setup.endpoint.shown_key or "the endpoint's"
    names = ", ".join(one.name for one in setup.models)
    return Configuration(
        title="JetBrains IDEs (AI Assistant)",
        steps=[
            "Open Settings | Tools | AI Assistant | Providers & API keys.",
            "Under Third-party AI providers choose OpenAI-compatible.",
            f"URL: {setup.endpoint.openai_url}",
            f"API key: {key if setup.endpoint.needs_key else 'leave it empty'}",
            "Tool calling: on for models with tools, off for the others.",
            f"Test Connection, Apply; then choose a model in the AI chat: {names}.",
        ],
        notes=[*key_note(setup, "enter it where the steps say."), *tools_note(setup)],
    )
