"""When each model was last asked for: the time of an empty file per model, named by a digest.

The engine marks, `gryphon list` reads. It says nothing of what was asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from app import paths
from app.errors import GryphonError


def mark(name: str) -> None:
    """A model is being used. A disk that is full or not ours is no reason to fail."""
    with contextlib.suppress(OSError, GryphonError):
        path = _file(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        paths.open_private(path).close()
        os.utime(path)


def last_used(name: str) -> float | None:
    """Seconds since the epoch; None if it never was, as far as is known."""
    try:
        return _file(name).stat().st_mtime
    except OSError:
        return None


def forget(name: str) -> None:
    """The model is no more."""
    with contextlib.suppress(OSError):
        _file(name).unlink()


def _file(name: str) -> Path:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    return paths.state_dir() / "used" / digest[:32]
