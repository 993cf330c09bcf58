"""The prefix cache's files: where they lie, whose words they hold, which of them go.

    prefixes/<key>/<name>.safetensors    layer states after some tokens, and those tokens
    prefixes/<key>/<name>.chats          the chats that go on from them, JSON of chat to tokens

A key stands for everything that must be equal for states to be of use (`app.engine.fingerprint`), a
name for the tokens. States that no chat goes on from have no second file and expire. A chat's
states are written after the file that says whose they are and removed before it, so that states
which a crash leaves behind can always be purged with their chat. No MLX here: a face purges a chat
where no engine runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app import paths
from app.errors import GryphonError

STATES, CHATS = ".safetensors", ".chats"
MAX_FILES = 512
"""In all: their headers are read when a model is loaded."""
_DEFAULT_BYTES = 4 * 1024**3
_DEFAULT_SHARE = 10
"""Of the free disk, one in so many bytes."""
_RESERVE_BYTES = 1024**3
"""Left free on the disk, whatever the setting."""
_UNTAGGED_S = 7 * 86400.0
"""How long states are kept that no chat goes on from."""


@dataclass(frozen=True)
class StoredStates:
    """One file of states."""

    path: Path
    nbytes: int
    used_s: float
    """When it was last written or read, seconds since 1970."""


class PrefixFiles:
    """The directory of all keys. One engine writes to it; files may vanish at any time.

    Args:
        root: An existing private directory.
        budget_bytes: Of all files together; 0 keeps none, None is a tenth of the free disk and
            4 GiB at most.
    """

    def __init__(self, root: Path, budget_bytes: int | None = None) -> None:
        self.root = root
        self._budget_bytes = budget_bytes

    @property
    def is_on(self) -> bool:
        return self._budget_bytes != 0

    def directory(self, key: str) -> Path:
        """The directory of a key, made if it is missing."""
        path = self.root / key
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        return path

    def clean(self) -> None:
        """Remove what is no whole file of ours, what has expired, and what is over the limits.

        To be called where nobody writes.

        Raises:
            OSError: something cannot be removed, here and below.
        """
        for directory in self._entries(self.root):
            if not stat.S_ISDIR(directory.lstat().st_mode):
                directory.unlink(missing_ok=True)
                continue
            for path in self._entries(directory):
                if not self._is_ours(path):
                    _discard(path)
        now = time.time()
        for stored in self.stored():
            if stored.used_s < now - _UNTAGGED_S and not self.chats(stored.path):
                self.remove(stored.path)
        self.make_room(0)
        for directory in self._entries(self.root):
            with contextlib.suppress(OSError):
                directory.rmdir()  # only if it is empty

    def stored(self, key: str = "") -> list[StoredStates]:
        """All files of states, or those of a key; the one used last comes last."""
        directories = [self.root / key] if key else self._entries(self.root)
        found = []
        for directory in directories:
            for path in self._entries(directory):
                if path.suffix == STATES:
                    with contextlib.suppress(OSError):
                        info = path.lstat()
                        if stat.S_ISREG(info.st_mode):
                            found.append(StoredStates(path, info.st_size, info.st_mtime))
        return sorted(found, key=lambda stored: stored.used_s)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of states."""
        return sum(stored.nbytes for stored in self.stored())

    def make_room(self, nbytes: int) -> list[Path] | None:
        """Remove what was used longest ago until so many bytes more have room.

        Returns:
            What was removed, or None if they would not fit into an empty directory: nothing is
            removed then.
        """
        stored = self.stored()
        used = sum(one.nbytes for one in stored)
        free = shutil.disk_usage(self.root).free
        limit = self._budget_bytes
        if limit is None:
            limit = min(_DEFAULT_BYTES, (free + used) // _DEFAULT_SHARE)
        limit = min(limit, used + free - _RESERVE_BYTES)
        if nbytes > max(0, limit):
            return None
        removed = []
        more = 1 if nbytes else 0
        while stored and (used + nbytes > limit or len(stored) + more > MAX_FILES):
            oldest = stored.pop(0)
            self.remove(oldest.path)
            removed.append(oldest.path)
            used -= oldest.nbytes
        return removed

    def chats(self, path: Path) -> dict[str, int]:
        """The chats that go on from a file's states, and how many of its tokens are theirs.

        Raises:
            ValueError: what says so is damaged.
        """
        try:
            text = _read_regular(path.with_suffix(CHATS))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(f"{path.with_suffix(CHATS)} cannot be read: {error}") from error
        try:
            chats = json.loads(text)
        except RecursionError as error:
            raise ValueError("lists in lists") from error
        if not isinstance(chats, dict) or any(
            type(count) is not int or count < 1 for count in chats.values()
        ):
            raise ValueError(f"expected an object of counts, got {chats!r:.80}")
        return chats

    def set_chats(self, path: Path, chats: dict[str, int]) -> None:
        """Say which chats go on from states that are there, or are about to be.

        Raises:
            OSError: it cannot be written.
        """
        target = path.with_suffix(CHATS)
        if not chats:
            target.unlink(missing_ok=True)
            return
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(chats, file)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def touch(self, path: Path) -> None:
        """Note that states were used."""
        with contextlib.suppress(OSError):
            os.utime(path, follow_symlinks=False)

    def remove(self, path: Path) -> None:
        """Remove a file of states and what is known of it."""
        _discard(path)
        _discard(path.with_suffix(CHATS))

    def forget(self, chat: str) -> dict[Path, dict[str, int] | None]:
        """Remove the states that hold words of this chat alone; all states if it is "".

        States from which another chat goes on, from their very end, stay and are that chat's.

        Returns:
            For every file of states that was the chat's: the chats that it has now, or None if it
            is gone.
        """
        changed: dict[Path, dict[str, int] | None] = {}
        for stored in self.stored():
            if not chat:
                self.remove(stored.path)
                changed[stored.path] = None
                continue
            try:
                chats = self.chats(stored.path)
                if chat not in chats:
                    continue
                length = max(chats.values())
                del chats[chat]
                if stays := max(chats.values(), default=0) == length:
                    self.set_chats(stored.path, chats)
            except (OSError, ValueError):  # nobody can say whose words these are
                chats, stays = {}, False
            if not stays:
                self.remove(stored.path)
            changed[stored.path] = chats if stays else None
        return changed

    def remove_unfinished(self) -> None:
        """Remove what an engine was writing when it was killed; to be called where none runs."""
        for directory in self._entries(self.root):
            for path in self._entries(directory):
                if path.name.startswith("."):
                    _discard(path)

    def _is_ours(self, path: Path) -> bool:
        """Whether it is a whole file of states, or what belongs to one."""
        try:
            if not stat.S_ISREG(path.lstat().st_mode) or path.name.startswith("."):
                return False
            if path.suffix == CHATS:
                return stat.S_ISREG(path.with_suffix(STATES).lstat().st_mode)
            self.chats(path)
        except (OSError, ValueError):
            return False
        return path.suffix == STATES

    def _entries(self, directory: Path) -> Iterator[Path]:
        """What lies in a directory of ours; nothing in one that is gone or a link elsewhere."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(directory.lstat().st_mode):
                yield from [directory / name for name in os.listdir(directory)]


def forget_without_engine(chat: str) -> None:
    """As `ForgetChat`, where no engine runs.

    Raises:
        GryphonError: "not_forgotten", or what `paths.prefix_dir` raises.
    """
    files = PrefixFiles(paths.prefix_dir())
    try:
        files.remove_unfinished()
        files.forget(chat)
    except OSError as error:
        raise not_forgotten(error) from error


def not_forgotten(error: Exception) -> GryphonError:
    """What to tell a person whose words could not be removed."""
    return GryphonError(
        "not_forgotten",
        f"Not everything could be removed: {error}. Remove the files in {paths.prefix_dir()} "
        "yourself.",
    )


def _discard(path: Path) -> None:
    """Remove whatever lies there; what it links to stays."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def _read_regular(path: Path) -> str:
    """The text of a file that is no link, pipe or device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return file.read(1_000_000)
