"""Which running gryphon has which conversation open."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


class Claims:
    """One byte-range lock per conversation in a file beside the database.

    The kernel drops the locks of a process that dies, however it dies, so a claim that succeeds
    proves that nobody is still writing to that conversation. It is never the database file itself
    that is locked: closing a second descriptor of it would drop SQLite's own locks.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, conversation: int) -> bool:
        """Hold `conversation` until released or until this process ends; False: another has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, conversation)
        except OSError as error:
            # Some network file systems have no locks at all; one gryphon alone still works there.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def release(self, conversation: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, conversation)

    def close(self) -> None:
        os.close(self._file)
