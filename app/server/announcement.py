"""Which endpoints run: a file for each in the state directory, locked while its process lives.

`gryphon editor` reads them to say where an editor finds this machine's endpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app import paths
from app.errors import GryphonError

_MAX_BYTES = 4096


@dataclass(frozen=True)
class RunningEndpoint:
    """What an endpoint says of itself."""

    url: str
    """http://ADDRESS:PORT, or https"""
    has_key: bool
    """It requires an API key."""


@contextlib.contextmanager
def announced(url: str, *, has_key: bool) -> Iterator[None]:
    """Tell of an endpoint for as long as this holds. A disk that is full is no reason to fail, and
    one that has no port is not for editors."""
    descriptor, path = None, None
    if not url.startswith("http"):
        yield
        return
    with contextlib.suppress(OSError, GryphonError):
        directory = _directory()
        directory.mkdir(mode=0o700, exist_ok=True)
        path = directory / f"{os.getpid()}-{url.rpartition(':')[2]}.json"
        # Locked before it has its name, so that nobody takes it for one of a dead process.
        unnamed = path.with_suffix(".new")
        descriptor = os.open(unnamed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps({"url": url, "has_key": has_key}).encode())
        unnamed.replace(path)
    try:
        yield
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
        if descriptor is not None:
            os.close(descriptor)


def running_endpoints() -> list[RunningEndpoint]:
    """Those of this user that run, the latest first; what dead processes left is removed."""
    found = []
    for path in _directory().glob("*.json"):
        with (
            contextlib.suppress(OSError, ValueError, KeyError, TypeError),
            path.open("rb") as file,
        ):
            if _is_locked(file.fileno()):
                began = os.fstat(file.fileno()).st_mtime
                told = json.loads(file.read(_MAX_BYTES))
                found.append((began, str(told["url"]), bool(told["has_key"])))
            else:
                path.unlink()
    return [RunningEndpoint(url, has_key) for _, url, has_key in sorted(found, reverse=True)]


def _directory() -> Path:
    return paths.state_dir() / "endpoints"


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
