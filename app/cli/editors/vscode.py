"""GitHub Copilot in VS Code with a model of one's own. Keys and clicks:
https://code.visualstudio.com/docs/agent-customization/language-models#_add-a-custom-endpoint-model
and its "Custom Endpoint configuration reference"; the user's directory:
https://code.visualstudio.com/docs/configure/settings#_user-settingsjson-location."""

from __future__ import annotations

from app.cli.config_text import Named, Put, jsonc
from app.cli.editors.configuration import (
    Configuration,
    ServedModel,
    SettingsFile,
    Setup,
    key_note,
    tools_note,
)

_GROUP = "Gryphon"


def configure(setup: Setup) -> Configuration:
    """A group of models of the provider "Custom Endpoint"."""
    group = (Named(_GROUP),)
    wanted = [
        Put((*group, "vendor"), "customendpoint"),
        Put((*group, "apiType"), "chat-completions"),
        Put((*group, "models"), [_model(setup, one) for one in setup.models]),
    ]
    key = setup.endpoint.key(None)
    if key is not None:
        # VS Code writes a reference to its own store here once a key was typed in.
        asked_for = setup.endpoint.shown_key is not None
        wanted.insert(2, Put((*group, "apiKey"), key, only_if_absent=not asked_for))
    key_how = (
        f"Chat: Manage Language Models, the gear beside {_GROUP}, and type it in there; VS Code "
        "keeps it in its own store."
    )
    return Configuration(
        title="VS Code (Copilot chat with your own model)",
        files=[
            SettingsFile(
                setup.places.config / "Code" / "User" / "chatLanguageModels.json", jsonc, wanted
            )
        ],
        steps=[
            "Restart VS Code and choose one of the models in the model picker of the chat.",
            "By hand: run Chat: Manage Language Models, Add Models, Custom Endpoint; group name "
            f"{_GROUP}, API type Chat Completions, and the models above.",
            "Titles and commit messages need chat.utilityModel, and models in the Agents window "
            "chat.agentHost.byokModels.enabled, in your settings.",
        ],
        notes=[*key_note(setup, key_how), *tools_note(setup), *_picker_note(setup)],
    )


def _picker_note(setup: Setup) -> list[str]:
    if all(one.has_tools for one in setup.models):
        return []
    return ["VS Code does not offer a model without tools while an agent is chosen."]


def _model(setup: Setup, model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "name": f"{model.name} (Gryphon)",
        "url": f"{setup.endpoint.openai_url}/chat/completions",
        "toolCalling": model.has_tools,
        "vision": False,
        "maxInputTokens": model.context - model.output,
        "maxOutputTokens": model.output,
    }
