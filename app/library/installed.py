"""Models on this machine, read from their files: Gryphon's own and those in the Hugging Face cache.

Fast enough for every command: no MLX, and of huggingface_hub only its constants, which say where
the cache is. Its layout is `models--ORG--NAME/{refs/BRANCH, snapshots/COMMIT/FILES}`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app import paths, settings_file
from app.engine.protocol import ModelRef
from app.errors import GryphonError
from app.settings import Settings
from mlxmodels.errors import ModelError
from mlxmodels.safetensors_header import TensorEntry, read_header

DEFAULT_MODEL = "smollm2-135m"
"""The embedded model (`app.library.embedded`), which runs when none is named."""

Source = Literal["gryphon", "hub", "path", "adapter"]

# Families whose state does not grow with the text: there is no length at which they must stop.
_UNLIMITED_FAMILIES = frozenset({"recurrent_gemma"})

# A name of a file, whatever it is: a test's or another program's cache may be generous.
_COMMIT = re.compile(r"\w+")
_MIN_COMMIT = 7
_WORD = re.compile(r"[\w.-]{1,40}")

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class InstalledModel:
    """A model directory that can be run, as read from its files without MLX."""

    name: str
    path: Path
    family: str
    """`model_type` of its config.json."""
    size_bytes: int
    quantization: str
    """For people: "4-bit", "mixed 4/8-bit", "bfloat16" …"""
    context_length: int | None
    source: Source
    """"gryphon" (converted by us), "hub" (in the Hugging Face cache), "path" (named by path) or
    "adapter" (a model with a LoRA adapter on it, `app.library.adapters`)."""
    modified: float
    base: str = ""
    """Of a model with an adapter: the model that it is put on."""
    adapter: Path | None = None
    """Its directory."""

    @property
    def ref(self) -> ModelRef:
        adapter = "" if self.adapter is None else str(self.adapter)
        return ModelRef(name=self.name, path=str(self.path), adapter=adapter)


def installed_models() -> list[InstalledModel]:
    """All of them, by name. A directory that is damaged or incomplete is left out, and so is an
    adapter whose base is."""
    from app.library import adapters

    models = {}
    for name, path, source in [*_hub_candidates(), *_own_candidates()]:
        try:
            models[name] = read_model(path, name, source)
        except GryphonError:
            continue
    models |= adapters.adapted(models)
    return [models[name] for name in sorted(models)]


def find_model(name: str | None = None, *, allow_path: bool = False) -> InstalledModel:
    """The installed model of that name or alias; without a name the default one.

    That is the one that GRYPHON_MODEL or the settings file names, else the embedded one, else the
    latest. A name wins over an alias, and an alias over a path; an alias never is one.

    Args:
        allow_path: Also accept the path of a model directory. Never set it for a name that came
            over the network.

    Raises:
        GryphonError: code "model_not_found" (names the installed ones and what to do),
            "no_model_installed", "default_model_missing", "invalid_model" for a directory that is
            no whole model, or "invalid_setting" for a settings file that cannot be read.
    """
    if name is None:
        return _default()
    try:
        return _installed(name)
    except GryphonError as error:
        if error.code != "model_not_found":
            raise
        not_found = error
    if (target := aliases().get(name)) is not None:
        return _aliased(name, target)
    if allow_path and _looks_like_path(name):
        path = Path(os.path.abspath(os.path.expanduser(name)))
        return read_model(path, path.name, "path")
    raise not_found


def resolve_alias(name: str) -> str:
    """The name that an alias stands for; any other as it is.

    For those who look at a model's directory, which may be damaged; others have `find_model`.
    """
    return name if find_place(name) else aliases().get(name, name)


def aliases() -> Mapping[str, str]:
    """Alias → model, as the settings file has them; the model need not be installed any more.

    Raises:
        GryphonError: "invalid_setting".
    """
    return settings_file.read().aliases


def default_setting() -> tuple[str, str] | None:
    """The name or alias that is set as the default model, and for people where; None without one.

    Raises:
        GryphonError: "invalid_setting".
    """
    if name := Settings.from_environment().default_model:
        return name, "GRYPHON_MODEL"
    if name := settings_file.read().default_model:
        return name, f"default_model in {paths.settings_file()}"
    return None


def find_place(name: str) -> tuple[Path, str, Source] | None:
    """Where the model of that name lies, whole or damaged: its directory, name and source."""
    for candidate, path, source in [*_own_candidates(), *_hub_candidates()]:
        if candidate == name:
            return path, name, source
    snapshot = _hub_revision(name)
    return (snapshot, name, "hub") if snapshot else None


def installed_name(repository: str, revision: str) -> str:
    """What the model at a revision of a repository on the hub is called here."""
    return repository if revision == "main" else f"{repository}@{revision}"


def read_model(path: Path, name: str, source: Source) -> InstalledModel:
    """What the files in `path` say of the model.

    Raises:
        GryphonError: "invalid_model", naming what is missing or wrong.
    """
    try:
        config = read_config(path)
        family = config.get("model_type")
        if not isinstance(family, str):
            raise _invalid(path, "its config.json has no model_type")
        weights = weight_files(path)
        files = [file.stat() for file in path.iterdir() if file.is_file()]
        return InstalledModel(
            name=name,
            path=path,
            family=family,
            size_bytes=sum(file.st_size for file in files),
            quantization=quantization(config, lambda: read_tensors(weights[0])),
            context_length=context_length(config),
            source=source,
            modified=max(file.st_mtime for file in files),
        )
    except OSError as error:
        raise _invalid(path, f"it cannot be read ({error.strerror or error})") from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        GryphonError: "invalid_model" when there is none, or it is no JSON object.
    """
    if not path.exists():
        raise GryphonError(
            "model_not_found",
            f"There is nothing at {path}. Give the directory of a model, or a name that "
            "`gryphon list` shows.",
        )
    if not path.is_dir():
        raise _invalid(path, "it is a file; expected a directory with config.json in it")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _invalid(path, "it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"its config.json is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise _invalid(path, "its config.json is not a JSON object")
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, every shard of the index present.

    Raises:
        GryphonError: "invalid_model" when there is none or one is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _invalid(path, f"its {index.name} is not a valid index") from error
        if any(Path(str(name)).name != name for name in names):
            raise _invalid(path, f"its {index.name} names files outside the directory")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise _invalid(path, f"{len(missing)} of its {len(names)} weight files are missing")
        files = [path / name for name in names]
    else:
        files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        raise _invalid(path, "it has no *.safetensors file")
    return files


def read_tensors(file: Path) -> dict[str, TensorEntry]:
    """Tensors of a safetensors file by name, from its checked header.

    Raises:
        GryphonError: "invalid_model" when the file is cut short or damaged.
    """
    try:
        return read_header(file)
    except ModelError as error:
        raise GryphonError("invalid_model", str(error)) from error


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens the model can attend to; None when it has no limit or the config does not say."""
    if config.get("model_type") in _UNLIMITED_FAMILIES:
        return None
    text = config.get("text_config")  # of a model that reads pictures too
    for source in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            value = source.get(key)
            if type(value) is int and 0 < value < 2**53:
                return value
    return None


def quantization(config: dict[str, Any], tensors: Callable[[], Mapping[str, TensorEntry]]) -> str:
    """How the weights are stored, for people.

    Args:
        tensors: Entries of a weight file, asked for when config.json does not say.
    """
    settings = config.get("quantization") or config.get("quantization_config")
    if isinstance(settings, dict):
        overrides = [value for value in settings.values() if isinstance(value, dict)]
        found = [entry.get("bits") for entry in (settings, *overrides)]
        bits = sorted({value for value in found if isinstance(value, int)})
        if bits:
            widths = "/".join(map(str, bits))
            return f"{widths}-bit" if len(bits) == 1 else f"mixed {widths}-bit"
        method = settings.get("quant_method")
        return method if isinstance(method, str) and _WORD.fullmatch(method) else "quantized"
    largest = max(tensors().values(), key=lambda tensor: tensor.nbytes, default=None)
    return _DTYPE_NAMES.get(largest.dtype, largest.dtype) if largest else "empty"


def _own_candidates() -> Iterator[tuple[str, Path, Source]]:
    """Directories of models that Gryphon converted; hidden ones are unfinished work."""
    for path in _directories(paths.models_dir()):
        if not path.name.startswith(".") and path != paths.adapters_dir():
            yield path.name, path, "gryphon"


def _hub_candidates() -> Iterator[tuple[str, Path, Source]]:
    """Of each model in the Hugging Face cache the `main` snapshot, and as NAME@REVISION what other
    branches and tags stand for; where nothing is named, the latest one."""
    for name, repository in hub_repositories():
        named = refs(repository)
        main = named.pop("main", None)
        if main is None and not named:
            main = _latest(repository)
        if main is not None and main.is_dir():
            yield name, main, "hub"
        for revision, snapshot in sorted(named.items()):
            if snapshot.is_dir() and snapshot != main:
                yield installed_name(name, revision), snapshot, "hub"


def _latest(repository: Path) -> Path | None:
    snapshots = _directories(repository / "snapshots")
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def hub_repositories() -> Iterator[tuple[str, Path]]:
    """Name and directory of every model repository in the Hugging Face cache."""
    from huggingface_hub import constants

    for repository in _directories(Path(constants.HF_HUB_CACHE)):
        kind, *name = repository.name.split("--")
        if kind == "models" and name:
            yield "/".join(name), repository


def refs(repository: Path) -> dict[str, Path]:
    """Snapshot of each branch and tag; it need not exist."""
    found = {}
    for ref in (repository / "refs").rglob("*"):
        try:
            commit = ref.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # a directory, as for refs/pr/1, or unreadable
            continue
        if _COMMIT.fullmatch(commit):
            name = ref.relative_to(repository / "refs").as_posix()
            found[name] = repository / "snapshots" / commit
    return found


def _hub_revision(name: str) -> Path | None:
    """The snapshot of NAME@REVISION, where REVISION may also be the beginning of a commit; of NAME
    alone, the latest one."""
    wanted, at, revision = name.partition("@")
    for found, repository in hub_repositories():
        if found != wanted:
            continue
        if not at:
            return _latest(repository)
        if snapshot := refs(repository).get(revision):
            return snapshot
        if len(revision) < _MIN_COMMIT:
            return None
        commits = [
            path
            for path in _directories(repository / "snapshots")
            if path.name.startswith(revision)
        ]
        return commits[0] if len(commits) == 1 else None
    return None


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError:  # absent, or not ours to read: no models there
        return []


def _aliased(alias: str, target: str) -> InstalledModel:
    try:
        return _installed(target)
    except GryphonError as error:
        if error.code != "model_not_found":
            raise
        raise GryphonError(
            "model_not_found",
            f"{alias} is an alias of {target}, which is not installed any more. Pull it again, or "
            f"let the alias stand for another model: `gryphon alias {alias} MODEL`.",
        ) from error


def _installed(name: str) -> InstalledModel:
    """The model of a name that is no alias.

    Raises:
        GryphonError: as `find_model`.
    """
    from app.library import adapters

    models = {model.name: model for model in installed_models()}
    if name in models:
        return models[name]
    if place := find_place(name):
        return read_model(*place)  # raises what the listing left out
    adapters.explain(name, models)  # raises for an adapter that the listing left out
    raise _not_found(name, list(models))


def _default() -> InstalledModel:
    if (setting := default_setting()) is not None:
        name, where = setting
        try:
            return find_model(name)
        except GryphonError as error:
            if error.code != "model_not_found":
                raise
            raise GryphonError(
                "default_model_missing",
                f"{error.message} It is set as the default model ({where}): "
                "`gryphon use MODEL` sets another, `gryphon use --unset` none.",
            ) from error
    models = {model.name: model for model in installed_models()}
    if not models:
        raise GryphonError(
            "no_model_installed",
            f"No model is installed. Get a small one with `gryphon pull {DEFAULT_MODEL}`.",
        )
    plain = [model for model in models.values() if model.adapter is None]
    latest = max(plain, key=lambda model: model.modified)
    return models.get(DEFAULT_MODEL, latest)


def _looks_like_path(name: str) -> bool:
    """True for what cannot be a model's name, and for what exists; `org/name` may be either."""
    is_hub_name = name.count("/") == 1 and not name.endswith("/")
    return (
        name.startswith((".", "~", "/"))
        or (os.sep in name and not is_hub_name)
        or os.path.exists(name)
    )


def _not_found(name: str, installed: list[str]) -> GryphonError:
    if name == DEFAULT_MODEL:
        what = f"{name} is not installed. Get it with `gryphon pull {name}`."
        return GryphonError("model_not_found", what)
    parts = [f"No installed model is called {name!r}."]
    near = difflib.get_close_matches(name, installed, n=1)
    if near:
        parts.append(f"Did you mean {near[0]}?")
    parts.append(
        f"Installed: {', '.join(installed)}."
        if installed
        else f"None is installed; get one with `gryphon pull {DEFAULT_MODEL}`."
    )
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        parts.append("`gryphon pull` fetches models from the Hugging Face Hub.")
    return GryphonError("model_not_found", " ".join(parts))


def _invalid(path: Path, why: str) -> GryphonError:
    return GryphonError(
        "invalid_model",
        f"{path} is not a model that Gryphon can run: {why}. See `gryphon list` for those it can.",
    )
