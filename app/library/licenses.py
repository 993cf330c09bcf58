"""The licence of a model as the hub stated it when it was pulled.

A repository's card says it, and cards are not among the files that a pull fetches. Kept beside our
own models: one small file per model, named by a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from app import paths
from app.errors import GryphonError

_MAX_CHARACTERS = 200


def remember(name: str, license: str | None) -> None:
    """A disk that is full or not ours is no reason for a pull to fail."""
    with contextlib.suppress(OSError, GryphonError):
        path = _file(name)
        if license is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(mode=0o700, exist_ok=True)
        written = path.with_name(f"{path.name}.tmp{os.getpid()}")
        with paths.open_private(written) as file:
            file.write(license[:_MAX_CHARACTERS].encode(errors="replace"))
        written.replace(path)


def remembered(name: str) -> str | None:
    """None where it was never pulled, or the hub stated none."""
    with contextlib.suppress(OSError, GryphonError, ValueError):
        return _file(name).read_text(encoding="utf-8") or None
    return None


def _file(name: str) -> Path:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    return paths.data_dir() / "licenses" / digest[:32]
