"""Remove a model from this machine, and say first what that frees."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import last_used
from app.errors import GryphonError
from app.library import adapters, aliases, licenses
from app.library.disk import file_error
from app.library.hub_cache import RepositoryCache
from app.library.installed import default_setting, find_model, find_place, resolve_alias


@dataclass(frozen=True)
class Removal:
    """What would be removed, and what that frees; `execute` does it."""

    name: str
    path: Path
    freed_bytes: int
    """Content that other revisions share stays, and is not counted."""
    unfinished: bool
    """It is a pull that never ended."""
    needed_by: tuple[str, ...] = ()
    """Adapters that go with it. They stay, and are of no use until it is back."""
    named_by: tuple[str, ...] = ()
    """What it is in the settings file: "the default model", "what the alias fast stands for"."""
    _repository: RepositoryCache | None = None
    _strategy: Any = None

    def execute(self) -> None:
        """
        Raises:
            GryphonError: "pull_running", or "no_write_permission".
        """
        try:
            if self._repository is None:
                _remove_directory(self.path)
            else:
                with self._repository.locked(self._refuse):
                    if self._strategy is None:
                        _remove_directory(self.path)
                    else:
                        # It logs what it cannot delete, and goes on; we look again.
                        self._strategy.execute()
        except OSError as error:
            raise file_error(self.path, self.name, error) from error
        if self.path.exists():
            raise GryphonError(
                "no_write_permission",
                f"{self.path} could not be removed. It may belong to another user.",
            )
        last_used.forget(self.name)
        licenses.remember(self.name, None)

    def _refuse(self) -> None:
        raise GryphonError(
            "pull_running", f"A pull of {self.name} is running. Stop it with Ctrl-C first."
        )


def plan_removal(name: str) -> Removal:
    """What removing a model would do. A repository's unfinished pull can be removed by its name; of
    a model with an adapter the adapter goes, and the base stays.

    Raises:
        GryphonError: "model_not_found", "usage" for an alias, or "invalid_model" for a repository
            in the cache that huggingface_hub cannot read.
    """
    if adapter := adapters.find_directory(name):
        removal = Removal(name, adapter[0], _size(adapter[0]), unfinished=False)
        return dataclasses.replace(removal, named_by=_named_by(name))
    if (target := resolve_alias(name)) != name:
        raise GryphonError(
            "usage",
            f"{name} is an alias of {target}. `gryphon alias --rm {name}` forgets the alias, "
            f"`gryphon rm {target}` removes the model.",
        )
    removal = _plan_removal(name)
    needed_by = tuple(one for one, base in adapters.installed_names() if _is_of(base, removal))
    return dataclasses.replace(removal, needed_by=needed_by, named_by=_named_by(name))


def _named_by(name: str) -> tuple[str, ...]:
    setting = default_setting()
    found = ["the default model"] if setting is not None and setting[0] == name else []
    return (*found, *(f"what the alias {alias} stands for" for alias in aliases.of(name)))


def _is_of(base: str, removal: Removal) -> bool:
    if base == removal.name:
        return True
    place = find_place(base)
    return place is not None and place[0] == removal.path


def _plan_removal(name: str) -> Removal:
    repository_name, _, revision = name.partition("@")
    if repository_name.count("/") == 1 and ".." not in repository_name:
        cache = RepositoryCache(repository_name)
        if cache.path.is_dir():
            return _plan_hub_removal(name, cache, revision)
    path = _place(name)
    return Removal(name, path, _size(path), unfinished=False)


def _plan_hub_removal(name: str, cache: RepositoryCache, revision: str) -> Removal:
    from huggingface_hub import scan_cache_dir

    scanned = scan_cache_dir(cache.path.parent)
    ours = cache.path.resolve()
    found = next((one for one in scanned.repos if Path(one.repo_path) == ours), None)
    snapshots = list(cache.snapshots.iterdir()) if cache.snapshots.is_dir() else []
    if not snapshots and not revision:
        return Removal(name, cache.path, _size(cache.path), unfinished=True, _repository=cache)
    path = _place(name)
    if found is None:
        raise GryphonError(
            "invalid_model",
            f"{cache.path} is not laid out as huggingface_hub does it, so nothing was removed. "
            "Remove it by hand if you do not need it.",
        )
    # The name without a revision stands for main and for older commits that nothing names.
    named = {
        one.commit_hash for one in found.revisions if one.refs - {"main"} and "main" not in one.refs
    }
    chosen = {
        one.commit_hash
        for one in found.revisions
        if Path(one.snapshot_path) == path.resolve() or not (revision or one.commit_hash in named)
    }
    # Alone: a repository that was duplicated on the hub has the same commits under two names.
    strategy = dataclasses.replace(scanned, repos=frozenset({found})).delete_revisions(*chosen)
    freed = strategy.expected_freed_size
    if strategy.repos:
        freed += sum(one.stat().st_size for one in cache.blobs.glob("*.incomplete"))
    return Removal(name, path, freed, unfinished=False, _repository=cache, _strategy=strategy)


def _place(name: str) -> Path:
    """Its directory; damaged models, too, can be removed."""
    place = find_place(name)
    return place[0] if place else find_model(name).path  # raises


def _remove_directory(path: Path) -> None:
    """Rename it first: what is half removed is not listed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".removed-") as trash:
        path.rename(Path(trash) / "model")
        shutil.rmtree(Path(trash) / "model")


def _size(path: Path) -> int:
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())
