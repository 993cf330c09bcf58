"""LoRA adapters on this machine. Each is a model of its own, called BASE+NAME.

An installed adapter is a directory NAME in `paths.adapters_dir()` with mlx-lm's two files and
base.json, which says the name of the model it goes with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from app import paths
from app.errors import GryphonError
from app.library.installed import InstalledModel, find_model, installed_models, read_config
from mlxmodels.adapter_files import CONFIG_FILE, TENSORS_FILE, Adapter, read_adapter
from mlxmodels.errors import ModelError

BASE_FILE = "base.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")


def with_adapter(model: InstalledModel, path: Path, name: str) -> InstalledModel:
    """The model that an adapter's directory makes of another one.

    Raises:
        GryphonError: "invalid_model", naming what is wrong with its files or that they belong to
            another model; "invalid_request" if the model has one already.
    """
    if model.adapter is not None:
        raise GryphonError(
            "invalid_request",
            f"{model.name} has an adapter on it already; name its base, {model.base}.",
        )
    adapter = _read(path)
    _check_layers(adapter, model)
    return dataclasses.replace(
        model,
        name=f"{model.name}+{name}",
        size_bytes=model.size_bytes + adapter.nbytes,
        source="adapter",
        modified=(path / TENSORS_FILE).stat().st_mtime,
        base=model.name,
        adapter=Path(os.path.abspath(path)),
    )


def adapted(models: Mapping[str, InstalledModel]) -> dict[str, InstalledModel]:
    """Models that the installed adapters make of these, by name."""
    found = {}
    for path in _directories():
        with contextlib.suppress(GryphonError, OSError):
            model = _adapted(path, models)
            found[model.name] = model
    return found


def explain(name: str, models: Mapping[str, InstalledModel]) -> None:
    """Say why an installed adapter is no model; nothing where it is one, or is not installed.

    Raises:
        GryphonError: as `with_adapter`, or "model_not_found" where its base is not installed.
    """
    for path in _directories():
        if name == f"{_base_of(path)}+{path.name}":
            _adapted(path, models)


def add(path: Path, name: str | None = None, base: str | None = None) -> InstalledModel:
    """Install an adapter: copy its two files, readable by their owner alone.

    Args:
        path: A directory as mlx-lm's trainer writes it.
        name: What to call it; the directory's name if None.
        base: An installed model; None takes what the adapter's own config names, if it is one.

    Raises:
        GryphonError: as `with_adapter` and `find_model`, "usage" for a name that cannot be one or
            is taken, or a base that is not known.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    name = path.name if name is None else name
    if not _NAME.fullmatch(name):
        raise GryphonError(
            "usage",
            f"An adapter's name is letters, digits, '.', '_' and '-', 64 at most, got {name!r}. "
            "Give one with --name.",
        )
    target = paths.adapters_dir() / name
    if target.exists():
        raise GryphonError(
            "usage",
            f"An adapter called {name} is installed already. Remove it with "
            f"`gryphon adapters rm {name}`, or give another --name.",
        )
    model = find_model(base) if base is not None else _named_base(_read(path))
    with_adapter(model, path, name)  # or refuse before anything is copied
    staging = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))  # 0700
    try:
        for file in (CONFIG_FILE, TENSORS_FILE):
            with open(path / file, "rb") as source, paths.open_private(staging / file) as copy:
                shutil.copyfileobj(source, copy)
        with paths.open_private(staging / BASE_FILE) as file_of_base:
            file_of_base.write(json.dumps({"base": model.name}).encode())
        staging.rename(target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise GryphonError(
                "no_write_permission", f"{path} cannot be copied: {error.strerror or error}."
            ) from error
        raise
    return with_adapter(model, target, name)


def remove(name: str) -> None:
    """Remove an installed adapter, by its own name or by that of the model it makes.

    Raises:
        GryphonError: "model_not_found", naming those there are.
    """
    for path in _directories():
        if name in (path.name, f"{_base_of(path)}+{path.name}"):
            if path.is_symlink():
                path.unlink()  # what it links to is not ours
                return
            hidden = path.with_name(f".{path.name}.removed")
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)  # gone at once, whatever happens to its files
            shutil.rmtree(hidden)
            return
    names = [path.name for path in _directories()]
    raise GryphonError(
        "model_not_found",
        f"No adapter is called {name!r}. Installed: {', '.join(names) or 'none'}.",
    )


def find_directory(name: str) -> tuple[Path, str] | None:
    """Where the adapter lies that makes the model of that name, whole or damaged, and its base."""
    for path in _directories():
        base = _base_of(path)
        if name == f"{base}+{path.name}":
            return path, base
    return None


def installed_names() -> list[tuple[str, str]]:
    """Name and base of every installed adapter, whether its base is installed or not."""
    return [(path.name, _base_of(path)) for path in _directories()]


def _directories() -> list[Path]:
    entries = sorted(paths.adapters_dir().iterdir())
    return [entry for entry in entries if entry.is_dir() and _NAME.fullmatch(entry.name)]


def _base_of(path: Path) -> str:
    try:
        base = json.loads((path / BASE_FILE).read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return base if isinstance(base, str) else ""


def _adapted(path: Path, models: Mapping[str, InstalledModel]) -> InstalledModel:
    base = _base_of(path)
    if base not in models:
        raise GryphonError(
            "model_not_found",
            f"The adapter {path.name} goes with {base or 'an unknown model'}, which is not "
            "installed. Install that model, or remove the adapter with "
            f"`gryphon adapters rm {path.name}`.",
        )
    return with_adapter(models[base], path, path.name)


def _named_base(adapter: Adapter) -> InstalledModel:
    """The installed model that an adapter's own config names, by name or by path."""
    models = [model for model in installed_models() if model.adapter is None]
    for model in models:
        if adapter.base and (
            model.name == adapter.base or Path(adapter.base).resolve() == model.path.resolve()
        ):
            return model
    said = f"says it was trained on {adapter.base!r}" if adapter.base else "does not say which"
    raise GryphonError(
        "usage",
        f"Which model does the adapter go with? It {said}, which is not installed by that name. "
        f"Give --base. Installed: {', '.join(model.name for model in models) or 'none'}.",
    )


def _read(path: Path) -> Adapter:
    try:
        return read_adapter(path)
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error


def _check_layers(adapter: Adapter, model: InstalledModel) -> None:
    """Refuse what is easy to see: the engine compares every tensor when it loads them."""
    config = read_config(model.path)
    layers = config.get("num_hidden_layers", config.get("num_layers"))
    if type(layers) is not int:
        return
    highest = max((int(n) for name in adapter.tensors for n in _LAYER.findall(name)), default=-1)
    needed = max(highest + 1, adapter.num_layers)
    if needed > layers:
        raise GryphonError(
            "invalid_model",
            f"{adapter.path} does not belong to {model.name}: it changes a layer {needed} and the "
            f"model has {layers}. Use it with the model it was trained on.",
        )
