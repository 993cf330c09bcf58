"""Is an installed model still what was installed: read every file, compare with its digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.errors import GryphonError
from app.library.installed import read_tensors
from app.library.transfer import git_blob_digest
from app.paths import open_private

DIGESTS = ".digests.json"
"""Of a model that was made here: the sha256 of each of its files, as it was installed."""

_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileCheck:
    """What came out for one file."""

    name: str
    """Within the directory."""
    path: Path
    size: int
    digest_known: bool
    """Files from the hub carry the digest of their content in their name, and `DIGESTS` has those
    of models made here; models that other programs made have none."""
    problem: str | None
    """None when it is as it should be."""
    blob: Path | None
    """Where its content lies; None for a file that is no link into the repository's blobs."""


def verify(model: Path, progress: Callable[[int, int], None]) -> list[FileCheck]:
    """Check every file of a model directory; damage is in the result, not raised.

    Args:
        progress: Called with bytes read and bytes in all; may raise to cancel.

    Raises:
        OSError: the directory cannot be listed.
    """
    known = _digests(model)
    there = {path for path in model.rglob("*") if not path.is_dir() and path != model / DIGESTS}
    paths = sorted(there | {model / name for name in known})
    total = sum(_size(path) for path in paths)
    done = 0
    checks = []
    for path in paths:
        before = done

        def read(count: int, before: int = before) -> None:
            progress(before + count, total)

        checks.append(_check(path, model, known.get(path.name), read))
        done += checks[-1].size
    return checks


def write_digests(model: Path) -> None:
    """Write down what the files of a directory are, for `verify`; call it before it is installed.

    Raises:
        OSError: one of them cannot be read, or the disk is full.
    """
    files = sorted(path for path in model.iterdir() if path.is_file() and path.name != DIGESTS)
    digests = {path.name: _digest(path, "0" * 64, 0, lambda count: None) for path in files}
    with open_private(model / DIGESTS) as file:
        file.write(json.dumps(digests, indent=2).encode())


def _digests(model: Path) -> dict[str, str]:
    try:
        found = json.loads((model / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: digest
        for name, digest in found.items()
        if Path(name).name == name and isinstance(digest, str) and _ETAG.fullmatch(digest)
    }


def _check(path: Path, model: Path, digest: str | None, read: Callable[[int], None]) -> FileCheck:
    size, blob = _size(path), _blob(path, model)
    etag = blob.name if blob is not None and _ETAG.fullmatch(blob.name) else digest
    try:
        problem = None
        if path.is_symlink() and blob is None:
            problem = "leads out of the repository's blobs"
        elif etag is not None and _digest(path, etag, size, read) != etag:
            was = "the hub has" if digest is None else "was installed"
            problem = f"its content is not what {was}"
        elif path.suffix == ".safetensors":
            read_tensors(path)
    except FileNotFoundError:
        problem = "its content is missing"
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
    except GryphonError as error:
        problem = error.message
    name = path.relative_to(model).as_posix()
    return FileCheck(name, path, size, etag is not None, problem, blob)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _blob(path: Path, model: Path) -> Path | None:
    """The file in `blobs` that a snapshot's link stands for; None for anything else."""
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / path.readlink()))
    return target if target.parent == model.parent.parent / "blobs" else None


def _digest(path: Path, etag: str, size: int, read: Callable[[int], None]) -> str:
    digest = hashlib.sha256() if len(etag) == 64 else git_blob_digest(size)
    count = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            count += len(data)
            read(count)
    return digest.hexdigest()
