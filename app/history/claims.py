"""Which running gryphon has which conversation open."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import ClassVar

# Conversations are numbered from 1: this byte says that the history itself is open.
_WHOLE_FILE = 0


class _LockFile:
    """The one descriptor of a lock file in this process.

    Closing any descriptor of a file drops all of the process's locks on it, so there must be no
    second one while the first holds locks.
    """

    open_files: ClassVar[dict[tuple[int, int], _LockFile]] = {}

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        info = os.fstat(self.descriptor)
        self.key = (info.st_dev, info.st_ino)
        self.users = 0
        self.holders: dict[int, Claims] = {}
        self.open_files[self.key] = self

    @classmethod
    def of(cls, path: Path) -> _LockFile:
        try:
            info = path.stat()
        except FileNotFoundError:
            return cls(path)
        return cls.open_files.get((info.st_dev, info.st_ino)) or cls(path)

    def lock(self, byte: int, kind: int) -> bool:
        try:
            fcntl.lockf(self.descriptor, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            # Some network file systems have no locks at all; one gryphon alone still works there.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def unlock(self, byte: int) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        del self.open_files[self.key]
        os.close(self.descriptor)


class Claims:
    """One byte-range lock per conversation in a file beside the database.

    The kernel drops the locks of a process that dies, however it dies, so a claim that succeeds
    proves that nobody is still writing to that conversation. It is never the database file itself
    that is locked: closing a second descriptor of it would drop SQLite's own locks.
    """

    def __init__(self, path: Path) -> None:
        self._file = _LockFile.of(path)
        self._file.users += 1
        self._file.lock(_WHOLE_FILE, fcntl.LOCK_SH)

    def take(self, conversation: int) -> bool:
        """Hold `conversation` until released or until this process ends; False: another has it."""
        if self._file.holders.get(conversation, self) is not self:
            return False
        if not self._file.lock(conversation, fcntl.LOCK_EX):
            return False
        self._file.holders[conversation] = self
        return True

    def release(self, conversation: int) -> None:
        """Let go of it; nothing to do when it is not held here."""
        if self._file.holders.get(conversation) is self:
            del self._file.holders[conversation]
            self._file.unlock(conversation)

    def is_only_user(self) -> bool:
        """Whether nobody else has the history open. Until `share`, no one else is the only one."""
        return self._file.users == 1 and self._file.lock(_WHOLE_FILE, fcntl.LOCK_EX)

    def share(self) -> None:
        """Let others open the history again, after `is_only_user`."""
        self._file.lock(_WHOLE_FILE, fcntl.LOCK_SH)

    def close(self) -> None:
        for conversation in [n for n, holder in self._file.holders.items() if holder is self]:
            self.release(conversation)
        self._file.users -= 1
        if not self._file.users:
            self._file.close()
