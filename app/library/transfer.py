"""Files of a repository from the hub into the cache: several at once, resumed, checked.

Each file is appended to `ETAG.incomplete` in order, so that what is on the disk is always its
beginning and the next pull, after a kill as after a cut, asks for the rest. The digest is computed
on the way; a file becomes a blob only when it has the name that the hub gave its content.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Literal, Protocol

from app.errors import GryphonError
from app.library.hub import Hub, RemoteFile, Repository
from app.library.hub_cache import RepositoryCache
from app.library.hub_errors import Interruption, RepositoryChanged, lasting

State = Literal["waiting", "checking", "downloading", "retrying", "done"]

PARALLEL = 4
"""Files at once. More gain nothing on one link and are many connections for the hub."""

_READ_BYTES = 1 << 22
_REPORT_S = 0.1
_RATE_WINDOW_S = 5.0
_DAMAGED_ATTEMPTS = 3
# A connection that brings a little and breaks, for ever, is not progress.
_MAX_BREAKS = 1000


@dataclass
class FileProgress:
    """One file of a transfer."""

    file: RemoteFile
    done: int
    """Bytes that are here."""
    state: State = "waiting"
    note: str = ""
    """Why it waits or is tried again."""
    received: int = 0
    """Bytes that came over the network, those of failed attempts too."""


@dataclass(frozen=True)
class Status:
    """A transfer at one moment."""

    files: list[FileProgress]
    done: int
    total: int
    received: int
    rate: float
    """Bytes per second from the network, over the last seconds."""

    @property
    def eta_s(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Stopped(Exception):
    """Another file failed, or the user wants no more."""


class Transfer:
    """Fetch `files` into `cache`. Used once."""

    def __init__(
        self,
        hub: Hub,
        repository: Repository,
        files: tuple[RemoteFile, ...],
        cache: RepositoryCache,
    ) -> None:
        self._hub = hub
        self._repository = repository
        self._cache = cache
        self._progress = [FileProgress(file, cache.bytes_here(file)) for file in files]
        # Largest first: the last file to end should be a small one.
        self._queue = deque(sorted(self._progress, key=lambda one: -one.file.size))
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._samples: deque[tuple[float, int]] = deque()

    def run(self, report: Callable[[Status], None]) -> None:
        """Return when every file is here.

        Args:
            report: Called some times a second, in this thread. An exception of it, or Ctrl-C,
                ends the transfer; what has arrived stays.

        Raises:
            GryphonError: "checksum_mismatch", "disk_full", no access, no network …
            RepositoryChanged: the hub has other files now.
        """
        self._cache.blobs.mkdir(parents=True, exist_ok=True)
        threads = [
            threading.Thread(target=self._work, name=f"transfer-{n}", daemon=True)
            for n in range(min(PARALLEL, len(self._progress)))
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(_REPORT_S / len(threads))
                report(self._status())
        finally:
            self._stop.set()
            if any(thread.is_alive() for thread in threads):
                self._hub.interrupt()
                for thread in threads:
                    thread.join(self._hub.patience.connect_s)
            if not any(thread.is_alive() for thread in threads):
                self._hub.resume()
        if self._failure is not None:
            raise self._failure

    def _status(self) -> Status:
        files = [replace(one) for one in self._progress]  # the originals go on changing
        received = sum(one.received for one in files)
        now = time.monotonic()
        self._samples.append((now, received))
        while now - self._samples[0][0] > _RATE_WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()
        first, before = self._samples[0]
        return Status(
            files=files,
            done=sum(one.done for one in files),
            total=sum(one.file.size for one in files),
            received=received,
            rate=(received - before) / (now - first) if now > first else 0.0,
        )

    def _work(self) -> None:
        """One thread: file after file until there is none, or one fails."""
        try:
            while not self._stop.is_set():
                try:
                    progress = self._queue.popleft()
                except IndexError:
                    return
                self._fetch(progress)
        except _Stopped:
            pass
        except BaseException as error:
            if self._failure is None and not self._stop.is_set():
                self._failure = error
            self._stop.set()
            self._hub.interrupt()

    def _fetch(self, progress: FileProgress) -> None:
        def wait() -> None:
            self._check_stop()
            progress.note = "another program fetches it"

        file = progress.file
        with self._cache.blob_locked(file, wait):
            if not self._cache.has(file):
                self._fetch_alone(progress)
        progress.done, progress.state, progress.note = file.size, "done", ""

    def _fetch_alone(self, progress: FileProgress) -> None:
        file, partial = progress.file, self._cache.partial(progress.file)
        for _ in range(_DAMAGED_ATTEMPTS):
            with partial.open("ab", buffering=0):  # created with the permissions of the umask
                pass
            with partial.open("r+b", buffering=0) as output:
                if self._receive(progress, output) == file.etag:
                    os.fsync(output.fileno())
                    partial.replace(self._cache.blob(file))
                    return
            # Damaged on the way, or before: by whom cannot be told, so all of it comes again.
            partial.unlink()
            progress.note = "it arrived damaged"
        raise GryphonError(
            "checksum_mismatch",
            f"{file.name} of {self._repository.name} arrived damaged {_DAMAGED_ATTEMPTS} times, so "
            "it was not installed. Something between the hub and this machine alters it (a proxy, "
            "bad memory or a bad disk): try another network, then pull again.",
        )

    def _receive(self, progress: FileProgress, output: IO[bytes]) -> str:
        """Bring the partial file to its full length; returns the name of its content."""
        file = progress.file
        digest = self._digest_of_partial(progress, output)
        failures = breaks = 0
        while progress.done < file.size:
            before = progress.done
            try:
                with self._hub.open(self._repository, file, start=progress.done) as body:
                    if body.begins_at != progress.done:
                        digest = self._begin_again(progress, output)
                    for chunk in body.chunks():
                        self._check_stop()
                        progress.received += len(chunk)
                        if progress.done + len(chunk) > file.size:
                            raise RepositoryChanged(f"{file.name} is longer than announced")
                        _write(output, chunk)
                        digest.update(chunk)
                        progress.done += len(chunk)
                        progress.state, progress.note = "downloading", ""
                if progress.done < file.size:
                    raise Interruption("hub_unavailable", "the answer ended early")
            except Interruption as error:
                self._check_stop()
                breaks += 1
                failures = 1 if progress.done > before else failures + 1
                wait_s = self._hub.patience.wait_s(failures, error)
                if wait_s is None or breaks > _MAX_BREAKS:
                    raise lasting(error, f"{file.name} of {self._repository.name}") from error
                progress.state, progress.note = "retrying", error.reason
                self._stop.wait(wait_s)
                self._check_stop()
        return digest.hexdigest()

    def _digest_of_partial(self, progress: FileProgress, output: IO[bytes]) -> _Digest:
        """Read what is there; the file's position is then its end."""
        file = progress.file
        if os.fstat(output.fileno()).st_size > file.size:
            return self._begin_again(progress, output)
        digest = content_digest(file)
        progress.done, progress.state = 0, "checking"
        while data := output.read(_READ_BYTES):
            self._check_stop()
            digest.update(data)
            progress.done += len(data)
        progress.state = "downloading"
        return digest

    def _begin_again(self, progress: FileProgress, output: IO[bytes]) -> _Digest:
        output.seek(0)
        output.truncate()
        progress.done = 0
        return content_digest(progress.file)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped


def content_digest(file: RemoteFile) -> _Digest:
    """A running digest whose hexdigest is the etag of the file's content."""
    return hashlib.sha256() if len(file.etag) == 64 else git_blob_digest(file.size)


def git_blob_digest(size: int) -> _Digest:
    """A running digest that ends as the name git gives `size` bytes of content."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _write(output: IO[bytes], chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[output.write(view) :]
