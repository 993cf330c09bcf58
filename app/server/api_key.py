"""The API key that Gryphon makes by itself and keeps, for its owner's eyes only."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from app import paths
from app.errors import GryphonError

_RANDOM_BYTES = 32


def path() -> Path:
    """Where the key is kept."""
    return paths.state_dir() / "api_key"


def kept() -> str | None:
    """The key made earlier; None when there is none.

    Raises:
        GryphonError: "unsafe_api_key": others may know it, or it is no key.
    """
    place = path()
    try:
        file = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unsafe(place, f"cannot be read ({error.strerror})") from error
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid():
            raise _unsafe(place, "is not a file of yours")
        if info.st_mode & 0o077:
            raise _unsafe(place, "can be read by others")
        key = os.read(file, 1024).decode("ascii", "replace").strip()
    finally:
        os.close(file)
    if len(key) < _RANDOM_BYTES or not key.isprintable():
        raise _unsafe(place, "holds no key")
    return key


def make() -> str:
    """A new key, which takes the place of an older one: 256 random bits in base64's URL alphabet.

    Raises:
        GryphonError: "no_write_permission".
    """
    place = path()
    key = secrets.token_urlsafe(_RANDOM_BYTES)
    new = place.with_name(f".api_key.{secrets.token_hex(8)}")
    try:
        # Under another name first: a reader finds the old key or the new one, never half of it.
        file = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(file, "w") as opened:
                opened.write(f"{key}\n")
            new.replace(place)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise GryphonError(
            "no_write_permission",
            f"The API key cannot be kept in {place}: {error.strerror}. Make its directory "
            "writable, or bring a key of your own in GRYPHON_API_KEY.",
        ) from error
    return key


def _unsafe(place: Path, why: str) -> GryphonError:
    return GryphonError(
        "unsafe_api_key",
        f"The API key in {place} {why}, so it is not used. Make a new one: "
        "`gryphon serve --generate-key`.",
    )
