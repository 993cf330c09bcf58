"""A bound on the memory of a process that runs what came with a model."""

from __future__ import annotations

import resource
import sys


def limit_address_space(nbytes: int) -> None:
    """Let this process fail alone where it wants more; on Linux only, and no limit is raised."""
    if sys.platform != "linux":  # macOS maps more than this before we begin, and then refuses it
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > nbytes:
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, hard))
