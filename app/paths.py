"""Where Gryphon keeps things. Directories are 0700 and files 0600: they hold people's words."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

import platformdirs

from app import settings
from app.errors import GryphonError

# sun_path holds 104 bytes on macOS and 108 on Linux, the closing zero included.
MAX_SOCKET_PATH = 103

_Kind = Literal["data", "cache", "state", "config"]


def _private(path: Path) -> Path:
    """Create `path` and its missing parents, 0700, and return it. What exists is left as it is."""
    try:
        missing = [one for one in (path, *path.parents) if not one.exists()]
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
    except OSError as error:
        raise GryphonError(
            "no_write_permission",
            f"Gryphon cannot use its directory {path}: {error.strerror or error}. "
            "Make it writable, or set GRYPHON_HOME to a directory you own.",
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise GryphonError(
            "no_write_permission",
            f"Gryphon cannot write to its directory {path}. "
            "Make it writable, or set GRYPHON_HOME to a directory you own.",
        )
    return path


def _directory(kind: _Kind) -> Path:
    return _private(_place(kind))


def _place(kind: _Kind) -> Path:
    home = settings.home()
    if home is not None:
        return home / kind
    dirs = platformdirs.PlatformDirs("gryphon", appauthor=False)
    try:
        places = {
            "data": dirs.user_data_path,
            "cache": dirs.user_cache_path,
            # macOS keeps data, settings and state in one place.
            "state": dirs.user_state_path / "state",
            "config": dirs.user_config_path,
        }
    except RuntimeError as error:
        raise GryphonError(
            "no_home", f"Your home directory is unknown ({error}). Set HOME or GRYPHON_HOME."
        ) from error
    return places[kind]


def open_private(path: Path) -> BinaryIO:
    """Open a file for appending; it is created 0600.

    Raises:
        GryphonError: "no_write_permission".
    """
    try:
        return os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab")
    except OSError as error:
        raise GryphonError(
            "no_write_permission",
            f"Gryphon cannot write {path}: {error.strerror or error}. Make it writable (perhaps "
            "another user made it), or set GRYPHON_HOME to a directory you own.",
        ) from error


def data_dir() -> Path:
    """Models and chats: what a person would back up."""
    return _directory("data")


def cache_dir() -> Path:
    """What can be made again: downloads in progress, the prepared BLAS library."""
    return _directory("cache")


def prefix_dir() -> Path:
    """What models have read, kept over a restart: `app.engine.prefix_files`.

    Raises:
        GryphonError: it exists and is a link, or belongs to somebody else.
    """
    path = _private(cache_dir() / "prefixes")
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise GryphonError(
            "unsafe_prefix_directory",
            f"{path} exists but is not a directory of yours, so Gryphon will not keep there what "
            "models have read. Remove it, or set GRYPHON_PREFIX_DISK_BYTES=0 to keep nothing.",
        )
    if info.st_mode & 0o077:
        path.chmod(0o700)
    return path


def settings_file() -> Path:
    """What a person has set, `app.settings_file`. Neither it nor its directory need exist."""
    return _place("config") / "settings.toml"


def config_dir() -> Path:
    """Where the settings file lies."""
    return _directory("config")


def state_dir() -> Path:
    """Instance lock, engine socket, logs."""
    return _directory("state")


def models_dir() -> Path:
    """Models converted by Gryphon, one directory each. Models from the hub stay in its cache."""
    return _private(data_dir() / "models")


def adapters_dir() -> Path:
    """Installed LoRA adapters, one directory each."""
    return _private(models_dir() / "adapters")


def history_path() -> Path:
    """The SQLite file that holds the chats."""
    return data_dir() / "history.sqlite3"


def engine_lock() -> Path:
    """Locked by the gryphon that owns the engine."""
    return state_dir() / "engine.lock"


def engine_log() -> Path:
    """What the engine process writes to its standard error."""
    return state_dir() / "engine.log"


def engine_socket() -> Path:
    """The engine's UNIX socket; in a private directory under /tmp when the state path is too long.

    Raises:
        GryphonError: the short directory exists and belongs to somebody else.
    """
    path = state_dir() / "engine.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    short = Path("/tmp") / f"gryphon-{os.getuid()}-{name}"  # not TMPDIR, which may be long itself
    try:
        short.mkdir(mode=0o700)
    except FileExistsError:
        info = short.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise GryphonError(
                "unsafe_socket_directory",
                f"{short} exists but is not a private directory of yours, so Gryphon will not put "
                "its engine socket there. Remove it, or set GRYPHON_HOME to a shorter path.",
            ) from None
    return short / "engine.sock"
