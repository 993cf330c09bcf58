"""What lies on the disk and no model needs, and what everything takes there.

In a repository of the Hugging Face cache: unfinished pulls, commits that no branch or tag names any
more, content that no commit uses. Beside our own models: what an ended process left half done.
What changed within the last hour is left alone: another program may be at work on it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app import paths
from app.errors import GryphonError
from app.library import adapters
from app.library.disk import file_error
from app.library.hub_cache import RepositoryCache
from app.library.installed import find_place, hub_repositories, read_model, refs

QUIET_S = 3600.0
"""What was written to since then is not a leftover."""


@dataclass(frozen=True)
class Leftover:
    """Things of one place that can go together."""

    name: str
    """The repository, or the directory for what is Gryphon's own."""
    what: str
    freed_bytes: int
    paths: tuple[Path, ...]
    repository: RepositoryCache | None = None

    def remove(self) -> None:
        """
        Raises:
            GryphonError: "pull_running", or "no_write_permission".
        """
        try:
            if self.repository is None:
                _remove(self.paths)
                return
            with self.repository.locked(self._refuse):
                # What has been taken into use since it was found stays.
                now = _of_repository(self.name, self.repository)
                _remove(now.paths if now is not None else ())
        except OSError as error:
            raise file_error(self.paths[0].parent, self.name, error) from error

    def _refuse(self) -> None:
        raise GryphonError("pull_running", f"A pull of {self.name} is running; wait for its end.")


def leftovers() -> list[Leftover]:
    """All of them, by name."""
    found = [
        _of_repository(name, RepositoryCache(name))
        for name, _ in hub_repositories()
        if name.count("/") <= 1
    ]
    found.append(_of_ourselves())
    return sorted((one for one in found if one is not None), key=lambda one: one.name)


def disk_use() -> list[tuple[str, int, Path]]:
    """Name, bytes and place of everything Gryphon knows of, largest first."""
    found = [(name, path) for name, path in hub_repositories()]
    models = paths.models_dir()
    own = [one for one in models.iterdir() if one.is_dir() and one != paths.adapters_dir()]
    found += [(one.name, one) for one in own]
    found += [(f"adapter {one.name}", one) for one in paths.adapters_dir().iterdir()]
    found.append(("kept prompts and answers", paths.prefix_dir()))
    sizes = [(name, size_of(path), path) for name, path in found]
    return sorted(sizes, key=lambda one: (-one[1], one[0]))


def size_of(path: Path) -> int:
    """Bytes of the files in a directory, or of a file; what a link leads to is not counted."""
    files = [path] if path.is_file() and not path.is_symlink() else path.rglob("*")
    total = 0
    for one in files:
        with contextlib.suppress(OSError):  # gone meanwhile
            if one.is_file() and not one.is_symlink():
                total += one.stat().st_size
    return total


def _of_repository(name: str, cache: RepositoryCache) -> Leftover | None:
    snapshots = _entries(cache.snapshots)
    named = set(refs(cache.path).values()) | _bases()
    # Where none of them is a whole model, the old ones may be all there is of it.
    is_whole = any(_is_whole(one) for one in snapshots if one in named)
    old = [one for one in snapshots if is_whole and one not in named and _is_quiet(one)]
    used = {
        link.resolve()
        for snapshot in snapshots
        if snapshot not in old
        for link in snapshot.rglob("*")
        if link.is_symlink()
    }
    blobs = cache.blobs.resolve()
    unused = [one for one in _entries(blobs) if one not in used and _is_quiet(one)]
    unfinished = [one for one in unused if one.name.endswith(".incomplete")]
    going = [*old, *unused]
    if cache.staging.is_dir() and _is_quiet(cache.staging):
        going.append(cache.staging)
    if not going:
        return None
    words = []
    if old:
        words.append("commits that no branch or tag names: " + ", ".join(c.name[:8] for c in old))
    if unfinished or not snapshots:
        words.append("an unfinished pull")
    if not words:
        words.append("content that no commit uses")
    freed = sum(size_of(one) for one in going)
    if not snapshots and set(_entries(blobs)) <= set(unused):
        going = [cache.path]
    return Leftover(name, ", ".join(words), freed, tuple(going), cache)


def _bases() -> set[Path]:
    """Snapshots that an adapter is put on."""
    places = [find_place(base) for _, base in adapters.installed_names()]
    return {place[0] for place in places if place is not None}


def _of_ourselves() -> Leftover | None:
    models = paths.models_dir()
    hidden = [
        *models.glob(".*.partial-*"),
        *models.glob(".removed-*"),
        *(one for one in paths.adapters_dir().iterdir() if one.name.startswith(".")),
    ]
    found = tuple(sorted(one for one in hidden if one.is_dir() and _is_quiet(one)))
    if not found:
        return None
    freed = sum(size_of(one) for one in found)
    return Leftover(str(models), "work that was never finished", freed, found)


def _is_whole(snapshot: Path) -> bool:
    try:
        read_model(snapshot, snapshot.name, "hub")
    except GryphonError:
        return False
    return True


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _is_quiet(path: Path) -> bool:
    """Nothing of it was written lately."""
    since = time.time() - QUIET_S
    try:
        return all(one.lstat().st_mtime < since for one in _whole(path))
    except OSError:  # it goes this moment
        return False


def _whole(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        yield from path.rglob("*")


def _remove(going: tuple[Path, ...]) -> None:
    for path in going:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
