"""A lock that processes share through a file; the system releases it when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.2


@contextlib.contextmanager
def locked(path: Path, while_waiting: Callable[[], None], mode: int = 0o600) -> Iterator[None]:
    """Hold the lock of the file at `path`, which is created.

    Args:
        while_waiting: Called again and again while somebody else holds it; may raise to give up.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            while not _take(descriptor):
                while_waiting()
                time.sleep(_POLL_S)
            # huggingface_hub removes lock files; a lock on a removed one excludes nobody.
            if os.fstat(descriptor).st_nlink > 0:
                yield
                return
        finally:
            os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
