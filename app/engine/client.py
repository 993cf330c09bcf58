"""Parent side of the engine: attach or spawn, stream, cancel, survive a crash. Without MLX."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import BinaryIO

import msgspec

import app
from app import paths
from app.engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Command,
    EngineStatus,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    GetStatus,
    LoadModel,
    ModelRef,
    Timings,
    Usage,
    Welcome,
    encode_frame,
    read_event,
)
from app.errors import GryphonError
from app.settings import child_environment

_START_TIMEOUT_S = 30.0
# What the engine answers without computing takes it milliseconds.
_ANSWER_TIMEOUT_S = 5.0
_MAX_BACKOFF_S = 10.0
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
        self._crashes = 0
        self._started_s = 0.0
        self._not_before_s = 0.0

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

    @property
    def may_spawn(self) -> bool:
        """After crashes in quick succession the next child has to wait, longer each time."""
        return self._process is None and time.monotonic() >= self._not_before_s

    def spawn(self) -> None:
        """Start the child."""
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
        self._started_s = time.monotonic()

    def crashed(self) -> str:
        """Note an unexpected end and how it ended; the next `spawn` backs off."""
        assert self._process is not None
        self._release()
        try:
            status = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()  # it closed the connection and is of no use any more
            status = self._process.wait()
        self._process = None
        stable = time.monotonic() - self._started_s > 60
        self._crashes = 1 if stable else self._crashes + 1
        # The first crash restarts at once: a person is waiting.
        delay = min(_MAX_BACKOFF_S, 0.25 * 2**self._crashes) if self._crashes > 1 else 0.0
        self._not_before_s = time.monotonic() + delay
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


def _unresponsive() -> GryphonError:
    return GryphonError(
        "engine_unresponsive",
        f"The engine process is there but has not answered for {_ANSWER_TIMEOUT_S:g} s. If it does "
        "not recover, end it (`pkill -9 -f app.engine.worker`); the next request starts another.",
    )


def _cancelled(request_id: str) -> Finished:
    return Finished(request_id, "cancelled", Usage(0, 0, 0), Timings(0.0, 0.0, 0.0))


class EngineClient:
    """One connection to the engine of this machine, used from one event loop.

    The first client to take the instance lock spawns the engine; the others attach to its socket.
    The engine ends with its owner, or later with the last one attached. Connecting, spawning and
    reconnecting after a crash happen by themselves at the next request.
    """

    def __init__(self) -> None:
        self._owned: EngineProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._unsent: dict[str, asyncio.Future[None]] = {}
        """Requests that wait for the engine to start, with that start."""
        self._ids = itertools.count(1)
        self._closed = False

    async def start(self) -> None:
        """Connect to the engine, spawning it when nobody has. Idempotent.

        Raises:
            GryphonError: "engine_not_started", "engine_version", "engine_stopped" (closed
                meanwhile), or what `app.paths` raises.
        """
        async with self._connecting:
            if self._writer is not None:
                return
            deadline = time.monotonic() + _START_TIMEOUT_S
            while time.monotonic() < deadline:
                if self._closed:
                    raise GryphonError("engine_stopped", "Gryphon is closing.")
                if self._owned is None:
                    self._owned = EngineProcess.try_own()
                if self._owned is not None and self._owned.may_spawn:
                    self._owned.spawn()
                if await self._attach():
                    return
                if self._owned is not None and self._owned.has_died:
                    how = self._owned.crashed()
                    raise GryphonError(
                        "engine_not_started",
                        f"The engine process ended while starting ({how}). "
                        f"Its log says why: {paths.engine_log()}",
                        retry_after=1.0,
                    )
                await asyncio.sleep(0.02)
            raise GryphonError(
                "engine_not_started",
                f"The engine did not answer within {_START_TIMEOUT_S:g} s. "
                f"Its log may say why: {paths.engine_log()}",
                retry_after=1.0,
            )

    async def close(self) -> None:
        """Cancel what runs and disconnect; an engine that nobody else uses ends."""
        self._closed = True
        async with self._connecting:
            writer, self._writer = self._writer, None
            if writer is not None:
                # Not a polite close: an engine that has been stopped would never read the rest.
                writer.transport.abort()
        if self._listener is not None:
            await self._listener
        self._fail_streams("engine_stopped", "Gryphon is closing.")
        if self._owned is not None:
            await asyncio.to_thread(self._owned.end)
            self._owned = None

    def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """Events of one request: Accepted, Progress*, Token*, then exactly one Finished or Failed.

        Never raises for engine faults (they arrive as `Failed`). Closing the iterator early
        (`aclose`, or the consuming task being cancelled) cancels the request in the engine.
        """
        return self._run(request)

    async def cancel(self, request_id: str) -> None:
        """Ask for an early end; the stream then finishes with reason "cancelled"."""
        if request_id in self._unsent:
            self._unsent[request_id].cancel()
        elif request_id in self._streams:
            self._send(Cancel(request_id))

    def load(self, model: ModelRef) -> AsyncIterator[Event]:
        """Make a model resident: Progress*, then Finished or Failed."""
        return self._run(LoadModel(f"load-{next(self._ids)}", model))

    async def status(self) -> EngineStatus | None:
        """Current status, or None when no engine runs (it is not started for this).

        Raises:
            GryphonError: "engine_version", or "engine_unresponsive".
        """
        async with self._connecting:
            if self._writer is None and not await self._attach():
                return None
        request_id = f"status-{next(self._ids)}"
        events = self._streams[request_id] = asyncio.Queue()
        try:
            self._send(GetStatus(request_id))
            event = await asyncio.wait_for(events.get(), timeout=_ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise _unresponsive() from None
        finally:
            del self._streams[request_id]
        return event if isinstance(event, EngineStatus) else None

    async def _run(self, command: GenerationRequest | LoadModel) -> AsyncIterator[Event]:
        if command.id in self._streams or command.id in self._unsent:
            message = f"A request with id {command.id!r} is running already."
            yield Failed(command.id, "invalid_request", message)
            return
        try:
            frame = encode_frame(command)
            if await self._started(command.id):
                yield _cancelled(command.id)
                return
        except GryphonError as error:
            yield Failed(command.id, error.code, error.message, error.retry_after)
            return
        events = self._streams[command.id] = asyncio.Queue()
        ended = False
        try:
            self._write(frame)
            while not ended:
                event = await events.get()
                ended = isinstance(event, (Finished, Failed))
                yield event
        finally:
            del self._streams[command.id]
            if not ended:
                self._send(Cancel(command.id))

    async def _started(self, request_id: str) -> bool:
        """Start the engine for a request; True when the request was cancelled meanwhile."""
        starting = self._unsent[request_id] = asyncio.ensure_future(self.start())
        try:
            await asyncio.wait({starting})
        finally:
            del self._unsent[request_id]
            starting.cancel()
        if starting.cancelled():
            return True
        starting.result()
        return False

    def _send(self, command: Command) -> None:
        self._write(encode_frame(command))

    def _write(self, frame: bytes) -> None:
        """Write a frame; a lost connection is the listener's to report."""
        if self._writer is not None:
            self._writer.write(frame)

    async def _attach(self) -> bool:
        """Connect to a listening engine; False when none listens.

        Raises:
            GryphonError: "engine_version", or "engine_unresponsive".
        """
        try:
            reader, writer = await asyncio.open_unix_connection(paths.engine_socket())
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        try:
            welcome = await asyncio.wait_for(read_event(reader), timeout=_ANSWER_TIMEOUT_S)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return False
        except TimeoutError:
            writer.close()
            raise _unresponsive() from None
        assert isinstance(welcome, Welcome)
        if welcome.protocol != PROTOCOL_VERSION:
            writer.close()
            raise GryphonError(
                "engine_version",
                f"An engine of gryphon {welcome.gryphon} is running and this is gryphon "
                f"{app.__version__}; they do not understand each other. Close the other one.",
            )
        self._writer = writer
        self._listener = asyncio.create_task(self._listen(reader))
        return True

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Hand events to their streams until the connection ends, then fail what is left."""
        try:
            while True:
                event = await read_event(reader)
                if not isinstance(event, Welcome) and event.id in self._streams:
                    self._streams[event.id].put_nowait(event)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            pass
        if self._closed:
            return
        async with self._connecting:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()
            how = ""
            if self._owned is not None:
                how = f" ({await asyncio.to_thread(self._owned.crashed)})"
        self._fail_streams(
            "engine_crashed",
            f"The engine stopped unexpectedly{how} while this was running. "
            "Nothing you wrote is lost: try again.",
        )

    def _fail_streams(self, code: str, message: str) -> None:
        for request_id, events in self._streams.items():
            events.put_nowait(Failed(request_id, code, message, retry_after=1.0))
