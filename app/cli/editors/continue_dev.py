"""Continue. Keys: https://docs.continue.dev/reference (config.yaml) and
https://docs.continue.dev/customize/model-providers/top-level/openai (apiBase); that a config.yaml
takes the place of a config.json: https://docs.continue.dev/yaml-migration."""

from __future__ import annotations

from app.cli.config_text import Named, Put, puts, yaml_text
from app.cli.editors.configuration import (
    Configuration,
    ServedModel,
    SettingsFile,
    Setup,
    key_note,
)
from app.errors import GryphonError


def configure(setup: Setup) -> Configuration:
    """One entry of `models` for each model."""
    directory = setup.places.home / ".continue"
    path = directory / "config.yaml"
    if (directory / "config.json").exists() and not path.exists():
        raise GryphonError(
            "old_configuration",
            f"Continue is set up in {directory / 'config.json'}, its older format, which a "
            "config.yaml would hide. Migrate it first: https://docs.continue.dev/yaml-migration.",
        )
    wanted = [
        Put(("name",), "Local models", only_if_absent=True),
        Put(("version",), "0.0.1", only_if_absent=True),
        Put(("schema",), "v1", only_if_absent=True),
    ]
    for model in setup.models:
        wanted += _entry(setup, model)
    return Configuration(
        title="Continue",
        files=[SettingsFile(path, yaml_text, wanted)],
        steps=["Choose one of the models under the chat's input."],
        notes=key_note(setup, f"put GRYPHON_API_KEY=... into {directory / '.env'}."),
    )


def _entry(setup: Setup, model: ServedModel) -> list[Put]:
    place = ("models", Named(f"{model.name} (Gryphon)"))
    values: dict[str, object] = {
        "provider": "openai",
        "model": model.name,
        "apiBase": setup.endpoint.openai_url,
    }
    if setup.endpoint.needs_key:
        values["apiKey"] = setup.endpoint.key("${{ secrets.GRYPHON_API_KEY }}")
    if model.context_length is not None:
        values["defaultCompletionOptions"] = {"contextLength": model.context_length}
    roles = Put((*place, "roles"), ["chat", "edit", "apply"], only_if_absent=True)
    return [*puts(place, values), roles]
