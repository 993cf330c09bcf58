"""Change which model is the default, and which names stand for which models."""

from __future__ import annotations

from app import settings_file
from app.errors import GryphonError
from app.library.installed import (
    DEFAULT_MODEL,
    InstalledModel,
    aliases,
    find_model,
    find_place,
    installed_models,
)


def use(name: str) -> InstalledModel:
    """Make an installed model, named or aliased, the default one.

    Raises:
        GryphonError: as `find_model`, and as `settings_file.set_default_model`.
    """
    model = find_model(name)
    settings_file.set_default_model(model.name)
    return model


def add(alias: str, name: str) -> InstalledModel:
    """Let an alias stand for an installed model; it may stand for another one already.

    Raises:
        GryphonError: as `find_model` and `settings_file.set_alias`; "usage" where a model is called
            so, and would be meant by the alias.
    """
    if alias == DEFAULT_MODEL or find_place(alias) or alias in _names():
        raise GryphonError(
            "usage", f"{alias} is the name of a model; an alias needs one of its own."
        )
    model = find_model(name)
    settings_file.set_alias(alias, model.name)
    return model


def remove(alias: str) -> str:
    """Forget an alias; returns the name that it stood for.

    Raises:
        GryphonError: "model_not_found", naming those there are.
    """
    known = aliases()
    if alias not in known:
        raise GryphonError(
            "model_not_found",
            f"No alias is called {alias!r}. Aliases: {', '.join(sorted(known)) or 'none'}.",
        )
    settings_file.set_alias(alias, None)
    return known[alias]


def of(name: str) -> list[str]:
    """The aliases of a model, by name."""
    return sorted(alias for alias, target in aliases().items() if target == name)


def _names() -> set[str]:
    return {model.name for model in installed_models()}
