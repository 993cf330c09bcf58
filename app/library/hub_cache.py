"""One repository in the Hugging Face cache, as huggingface_hub lays it out.

    models--ORG--NAME/
        blobs/ETAG                 content; ETAG.incomplete while it arrives
        snapshots/COMMIT/FILE      links into blobs
        refs/BRANCH                the commit

Files have the permissions that huggingface_hub gives them (the umask's), because other programs
read them too. An unfinished file keeps huggingface_hub's name for one, so that its tools show and
remove it. A snapshot comes into being by one rename.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import constants

from app.library.file_lock import locked
from app.library.hub import RemoteFile

# Locks are shared with whoever shares the cache.
_LOCK_MODE = 0o666


class RepositoryCache:
    """Where the files of one repository lie, or will."""

    def __init__(self, name: str) -> None:
        """`name` is ORG/NAME, checked by who calls."""
        cache = Path(constants.HF_HUB_CACHE)
        folder = "--".join(["models", *name.split("/")])
        self.path = cache / folder
        self.blobs = self.path / "blobs"
        self.snapshots = self.path / "snapshots"
        self._locks = cache / ".locks" / folder
        self.staging = self.path / ".gryphon-staging"

    def snapshot(self, commit: str) -> Path:
        return self.snapshots / commit

    def blob(self, file: RemoteFile) -> Path:
        return self.blobs / file.etag

    def partial(self, file: RemoteFile) -> Path:
        return self.blobs / f"{file.etag}.incomplete"

    def has(self, file: RemoteFile) -> bool:
        """Its content is here. Only the size is looked at; `gryphon verify` reads it."""
        try:
            return self.blob(file).stat().st_size == file.size
        except OSError:
            return False

    def bytes_here(self, file: RemoteFile) -> int:
        """How much of its content is here, finished or not."""
        if self.has(file):
            return file.size
        try:
            size = self.partial(file).stat().st_size
        except OSError:
            return 0
        return size if size <= file.size else 0

    def is_installed(self, commit: str, files: tuple[RemoteFile, ...]) -> bool:
        """The snapshot has every file, with the size it should have."""
        snapshot = self.snapshot(commit)
        try:
            return all((snapshot / file.name).stat().st_size == file.size for file in files)
        except OSError:
            return False

    @contextlib.contextmanager
    def locked(self, while_waiting: Callable[[], None]) -> Iterator[None]:
        """One pull of a repository at a time."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with locked(self._locks / "gryphon-pull.lock", while_waiting, _LOCK_MODE):
            yield

    @contextlib.contextmanager
    def blob_locked(self, file: RemoteFile, while_waiting: Callable[[], None]) -> Iterator[None]:
        """The lock that huggingface_hub, too, holds while it fetches the same content."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with locked(self._locks / f"{file.etag}.lock", while_waiting, _LOCK_MODE):
            yield

    def stage(self, commit: str, files: tuple[RemoteFile, ...]) -> Path:
        """A directory with links to the files, which are all here; call it under the lock."""
        shutil.rmtree(self.staging, ignore_errors=True)  # its process is dead
        staged = self.staging / commit  # as deep as the snapshot, so that links fit both
        staged.mkdir(parents=True)
        for file in files:
            link = staged / file.name
            link.parent.mkdir(exist_ok=True)  # one directory down at most
            up = "../" * file.name.count("/")
            link.symlink_to(Path(f"{up}../../blobs") / file.etag)
        return staged

    def install(self, staged: Path, commit: str) -> Path:
        """Turn the staged directory into the snapshot; returns its path.

        Files that another program put into the same snapshot stay in it.
        """
        snapshot = self.snapshot(commit)
        self.snapshots.mkdir(exist_ok=True)
        if snapshot.exists():
            shutil.copytree(
                snapshot, staged, symlinks=True, dirs_exist_ok=True,
                ignore=lambda directory, names: _already(Path(directory), snapshot, staged, names),
                copy_function=_link_or_copy,
            )  # fmt: skip
            # Between these two renames there is no snapshot: what is left of a pull that dies here
            # is every file in blobs, and the next one is done at once.
            snapshot.rename(self.staging / "replaced")
        staged.rename(snapshot)
        shutil.rmtree(self.staging, ignore_errors=True)
        return snapshot

    def discard(self, files: tuple[RemoteFile, ...]) -> None:
        """Remove what was staged, and of the files' content what no snapshot links to; call it
        under the lock."""
        shutil.rmtree(self.staging, ignore_errors=True)
        entries = list(self.snapshots.rglob("*"))
        used = {entry.resolve() for entry in entries if entry.is_symlink()}
        for file in files:
            if self.blob(file).resolve() not in used:
                self.blob(file).unlink(missing_ok=True)
                self.partial(file).unlink(missing_ok=True)
        if not entries and self.path.is_dir() and not any(self.blobs.glob("*")):
            shutil.rmtree(self.path)

    def set_ref(self, revision: str, commit: str) -> None:
        """Remember what the branch or tag stands for, as huggingface_hub does."""
        if len(revision) >= 7 and commit.startswith(revision):
            return
        ref = self.path / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        written = ref.with_name(f"{ref.name}.gryphon.tmp")
        written.write_text(commit, encoding="utf-8")
        written.replace(ref)


def _already(directory: Path, snapshot: Path, staged: Path, names: list[str]) -> list[str]:
    place = staged / directory.relative_to(snapshot)
    return [name for name in names if os.path.lexists(place / name) and not _is_folder(place, name)]


def _is_folder(place: Path, name: str) -> bool:
    return (place / name).is_dir() and not (place / name).is_symlink()


def _link_or_copy(source: str, target: str) -> None:
    """A file that is no link is the only copy of its content; do not write it again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
