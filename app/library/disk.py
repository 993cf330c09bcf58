"""Room on the disk before something is fetched, and the disk's errors in words."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from app.errors import GryphonError

HUB = "HF_HUB_CACHE"
OWN = "GRYPHON_HOME"
"""The variables that move what comes from the hub, and what is Gryphon's own, to another disk."""


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(one for one in (path, *path.parents) if one.exists())


def free_bytes(directory: Path) -> int:
    """On the disk of a directory, which need not exist."""
    return shutil.disk_usage(existing(directory)).free


def check_room(directory: Path, needed: int, name: str, variable: str) -> None:
    """
    Args:
        needed: Bytes that will be written, spare ones too.

    Raises:
        GryphonError: "disk_full".
    """
    free = free_bytes(directory)
    if needed > free:
        raise GryphonError(
            "disk_full",
            f"{name} needs {_size(needed)} and the disk of {directory} has {_size(free)} free. "
            f"Free some space, or set {variable} to another disk.",
        )


def file_error(directory: Path, name: str, error: OSError, variable: str = HUB) -> GryphonError:
    """An error of the disk while something was written to a directory."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kept = "What has arrived is kept: free some space" if variable == HUB else "Free some space"
        again = "continues from there" if variable == HUB else f"again, or set {variable}"
        return GryphonError(
            "disk_full",
            f"The disk of {directory} ran full. {kept}, then `gryphon pull {name}` {again}"
            f"{'' if variable == HUB else ' to another disk'}.",
        )
    if error.errno == errno.EFBIG:
        return GryphonError(
            "disk_full",
            f"The disk of {directory} takes no file this large, as those formatted as FAT32 take "
            f"none of 4 GB: {name} needs another one. Set {variable} to a directory there.",
        )
    return GryphonError(
        "no_write_permission",
        f"{name} cannot be written to {directory}: {error.strerror or error}. Make it writable, "
        f"or set {variable} to a directory you own.",
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
