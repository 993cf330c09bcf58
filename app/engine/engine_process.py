"""The engine process that this one owns: started, kept alive, let go of. Without MLX."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from typing import BinaryIO

from app import paths, settings_file
from app.settings import child_environment

_MAX_LOG_BYTES = 1_000_000
# An engine that nobody else uses is gone in milliseconds.
_END_TIMEOUT_S = 1.0


class EngineProcess:
    """The engine this process owns: child, lock and the pipe that keeps the child alive.

    The child inherits the locked file. So the lock is held while either lives: when the owner goes
    first, the engine serves whoever is still attached, and only then another may be started.
    """

    def __init__(self, lock: BinaryIO) -> None:
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._alive_fd = -1

    @classmethod
    def try_own(cls) -> EngineProcess | None:
        """Take the instance lock, or return None while another gryphon holds it."""
        lock = paths.open_private(paths.engine_lock())
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return cls(lock)

    @property
    def has_died(self) -> bool:
        """Whether the child has ended, and `crashed` has not been told of it."""
        return self._process is not None and self._process.poll() is not None

    def spawn(self) -> None:
        """Start the child.

        Raises:
            GryphonError: "invalid_setting", or what `app.paths` raises.
        """
        settings_file.keep_alive_s()  # what is wrong is said here rather than in the child's log
        socket_path = paths.engine_socket()
        socket_path.unlink(missing_ok=True)
        read_fd, self._alive_fd = os.pipe()
        log_path = paths.engine_log()
        if log_path.exists() and log_path.stat().st_size > _MAX_LOG_BYTES:
            log_path.rename(log_path.with_suffix(".log.old"))
        log = paths.open_private(log_path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "app.engine.worker"]
                + ["--socket", str(socket_path), "--alive-fd", str(read_fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[read_fd, self._lock.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the face, not for the engine
                env=child_environment(),
            )
        finally:
            log.close()
            os.close(read_fd)

    def crashed(self) -> str:
        """Collect a child that ended unexpectedly, and what it left running; how it ended.

        Lets go of the lock too: whoever needs an engine first starts the next one. The owner of
        this one may be a chat that nobody types in.
        """
        assert self._process is not None
        self._release()
        try:
            status = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()  # it closed the connection and is of no use any more
            status = self._process.wait()
        # It led a group of its own. A child of it may be in the middle of a template that loops.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._lock.close()
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def end(self) -> None:
        """Let go of the child, which ends as soon as nobody is attached to it, and of the lock."""
        self._release()
        self._lock.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # Others use it: it is not ours to wait for, nor to be warned about at exit.
                self._process.returncode = 0

    def _release(self) -> None:
        if self._alive_fd >= 0:
            os.close(self._alive_fd)
            self._alive_fd = -1
