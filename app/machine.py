"""Memory of this machine as a process on it finds it: psutil's figures within the cgroups' limits.

No MLX: the engine, the library and the CLI read it alike.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

# Left to the rest of the machine, on top of what the engine accounts for.
RESERVE_BYTES = 768 * 1024**2

_GIB = 1024**3


@dataclass(frozen=True)
class SystemMemory:
    """Bytes that this process may have in all, and of them those that are free now."""

    total_bytes: int
    free_bytes: int


def system_memory(root: Path = Path("/")) -> SystemMemory:
    """What the machine has, or the narrowest cgroup that this process is in if that is less.

    Args:
        root: Where /proc and /sys are found.
    """
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, used in _cgroups(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return SystemMemory(total, free)


def gpu_working_set_estimate() -> int | None:
    """What Metal recommends a process to keep on an Apple GPU at most; None elsewhere.

    An estimate for those who may not ask Metal: two thirds of the memory, three quarters on
    machines of more than 36 GiB. The engine takes the device's own figure.
    """
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    total = int(psutil.virtual_memory().total)
    return total * 3 // 4 if total > 36 * _GIB else total * 2 // 3


def binary_bytes(count: int) -> str:
    """A number of bytes for people: "1.5 GiB", "20.0 MiB", "7 KiB"."""
    if count >= _GIB:
        return f"{count / _GIB:.1f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.1f} MiB"
    return f"{-(-count // 2**10)} KiB"


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every cgroup with a limit, from ours up, of either version.

    What the kernel drops by itself when memory gets short, file pages not used lately, is not use.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1
        elif not controllers:
            mount, names = root / "sys/fs/cgroup", _V2
        else:
            continue
        # In a container the path is the host's and not there: its parents end at the mount itself.
        here = PurePosixPath("/") / path
        for group in (here, *here.parents):
            directory = mount / str(group).lstrip("/")
            limit, used = _number(directory / names.limit), _number(directory / names.used)
            if limit is not None and used is not None:
                yield limit, used - _reclaimable(directory / "memory.stat", names.reclaimable)


@dataclass(frozen=True)
class _Names:
    limit: str
    used: str
    reclaimable: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def _number(path: Path) -> int | None:
    """The number in a file; None without one ("max", or no such file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
