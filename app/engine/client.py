"""Parent side of the engine: attach or spawn, stream, cancel, survive a crash. Without MLX."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

import app
from app import paths, settings_file
from app.engine.prefix_files import forget_without_engine
from app.engine.protocol import (
    MAX_REQUEST_ID,
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    Command,
    DraftModel,
    EngineStatus,
    Event,
    Failed,
    Finished,
    ForgetChat,
    GenerationRequest,
    GetStatus,
    LoadModel,
    ModelRef,
    Progress,
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
# An engine that lived this long did not die of how it was started.
_STABLE_S = 60.0
_MAX_LOG_BYTES = 1_000_000
# An engine that nobody else uses is gone in milliseconds.
_END_TIMEOUT_S = 1.0


@dataclass
class Backoff:
    """A wait after failures in a row: none after the first, then `first_s`, doubled up to `cap_s`.

    The first costs nothing because a person is waiting and it may have been the only one.
    """

    first_s: float
    cap_s: float
    failures: int = 0
    _wait_s: float = 0.0
    _not_before_s: float = 0.0

    def failed(self) -> None:
        """Note a failure."""
        self.failures += 1
        if self.failures > 1:
            self._wait_s = min(self.cap_s, 2 * self._wait_s or self.first_s)
            self._not_before_s = time.monotonic() + self._wait_s

    def succeeded(self) -> None:
        """Forget the failures."""
        self.failures, self._wait_s, self._not_before_s = 0, 0.0, 0.0

    @property
    def remaining_s(self) -> float:
        """Seconds until the next attempt is due; 0 when it is."""
        return max(0.0, self._not_before_s - time.monotonic())


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


def _unresponsive() -> GryphonError:
    return GryphonError(
        "engine_unresponsive",
        f"The engine process is there but has not answered for {_ANSWER_TIMEOUT_S:g} s. If it does "
        "not recover, end it (`pkill -9 -f app.engine.worker`); the next request starts another.",
    )


def _restarting(deaths: Backoff) -> GryphonError:
    wait_s = max(1, math.ceil(deaths.remaining_s))
    return GryphonError(
        "engine_restarting",
        f"The engine has ended unexpectedly {deaths.failures} times in a row, so it is started "
        f"again in {wait_s} s. Its log may say why: {paths.engine_log()}",
        retry_after=wait_s,
    )


Loads = tuple[ModelRef, ModelRef | None]
"""What a request has loaded: its model, and the one that drafts for it."""


def _loads_of(command: GenerationRequest | LoadModel) -> Loads:
    speculation = command.speculation if isinstance(command, GenerationRequest) else None
    drafting = speculation.model if isinstance(speculation, DraftModel) else None
    return command.model, drafting


def _crashes_engine(loads: Loads, deaths: Backoff) -> GryphonError:
    wait_s = max(1, math.ceil(deaths.remaining_s))
    names = " with ".join(model.name for model in loads if model is not None)
    return GryphonError(
        "model_crashes_engine",
        f"The engine ended while loading {names}, {deaths.failures} times in a row, so it is "
        f"not loaded again for {wait_s} s. It may need more memory than there is, or its files may "
        f"be damaged. Choose another model meanwhile; the log may say more: {paths.engine_log()}",
        retry_after=wait_s,
    )


@dataclass
class _Stream:
    """What somebody here waits for: events, and of which models; None for a status."""

    loads: Loads | None = None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


def _cancelled(request_id: str) -> Finished:
    return Finished(request_id, "cancelled", Usage(0, 0, 0), Timings(0.0, 0.0, 0.0))


class EngineClient:
    """One connection to the engine of this machine, used from one event loop.

    The first client to take the instance lock spawns the engine; the others attach to its socket.
    The engine ends with its owner, or later with the last one attached. Connecting, spawning and
    reconnecting after a crash happen by themselves at the next request: at once after the first
    crash; after more without an answer between them requests are refused for a while, with
    `retry_after`. A model whose loading ends the engine is refused for longer, alone.
    """

    def __init__(self) -> None:
        self.starts = 0
        """Engines started by this client."""
        self.crashes = 0
        """Engines that ended unexpectedly, started by whomever, while it was connected to them or
        waited for them."""
        self._owned: EngineProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._streams: dict[str, _Stream] = {}
        self._unsent: dict[str, asyncio.Future[None]] = {}
        """Requests that wait for the engine to start, with that start."""
        self._ids = itertools.count(1)
        self._closed = False
        self._attached_s = 0.0
        self._deaths = Backoff(first_s=1.0, cap_s=30.0)
        """Of the engine, without an answer between them."""
        self._load_deaths: dict[Loads, Backoff] = {}
        self._loading: tuple[str, Loads] | None = None
        """The load under way as far as we were told, with the request that it is for. A death that
        comes before the news of its load counts against the engine alone."""

    async def start(self) -> None:
        """Connect to the engine, spawning it when nobody has. Idempotent.

        Raises:
            GryphonError: "engine_not_started", "engine_restarting" (it is not started yet after
                crashes in a row), "engine_version", "engine_stopped" (closed meanwhile), or what
                `app.paths` raises.
        """
        async with self._connecting:
            if self._writer is not None:
                return
            deadline = time.monotonic() + _START_TIMEOUT_S
            while time.monotonic() < deadline:
                if self._closed:
                    raise GryphonError("engine_stopped", "Gryphon is closing.")
                if self._owned is None:
                    self._owned = self._spawn_if_nobody_has()
                if await self._attach():
                    return
                if self._owned is not None and self._owned.has_died:
                    owned, self._owned = self._owned, None
                    how = owned.crashed()
                    self.crashes += 1
                    self._deaths.failed()
                    raise GryphonError(
                        "engine_not_started",
                        f"The engine process ended while starting ({how}). "
                        f"Its log says why: {paths.engine_log()}",
                        retry_after=max(1.0, self._deaths.remaining_s),
                    )
                await asyncio.sleep(0.02)
            raise GryphonError(
                "engine_not_started",
                f"The engine did not answer within {_START_TIMEOUT_S:g} s. "
                f"Its log may say why: {paths.engine_log()}",
                retry_after=1.0,
            )

    def _spawn_if_nobody_has(self) -> EngineProcess | None:
        """A new engine of ours, or None when another gryphon owns one.

        Raises:
            GryphonError: "engine_restarting".
        """
        owned = EngineProcess.try_own()
        if owned is None:
            return None
        try:
            if self._deaths.remaining_s:
                raise _restarting(self._deaths)
            owned.spawn()
            self.starts += 1
        except BaseException:
            owned.end()
            raise
        return owned

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
        event = await self._ask(GetStatus(f"status-{next(self._ids)}"), _ANSWER_TIMEOUT_S)
        return event if isinstance(event, EngineStatus) else None

    async def forget_chat(self, chat: str) -> None:
        """Drop what is kept of a chat's words, in memory and on disk; of all words if it is "".

        Done by the engine if one runs, else here; none is started for this.

        Raises:
            GryphonError: "not_forgotten" with what could not be removed; "engine_version",
                "engine_unresponsive", "engine_stopped" (closed meanwhile).
        """
        event = await self._ask(ForgetChat(f"forget-{next(self._ids)}", chat), None)
        if isinstance(event, Failed) and event.code != "engine_crashed":
            raise GryphonError(event.code, event.message)
        if not isinstance(event, Finished):
            await asyncio.to_thread(forget_without_engine, chat)

    async def _ask(self, command: GetStatus | ForgetChat, timeout_s: float | None) -> Event | None:
        """The one answer to a command, or None when no engine runs (none is started for this)."""
        async with self._connecting:
            if self._writer is None and not await self._attach():
                return None
        stream = self._streams[command.id] = _Stream()
        try:
            self._send(command)
            return await asyncio.wait_for(stream.events.get(), timeout_s)
        except TimeoutError:
            raise _unresponsive() from None
        finally:
            del self._streams[command.id]

    async def _run(self, command: GenerationRequest | LoadModel) -> AsyncIterator[Event]:
        message = ""
        if command.id in self._streams or command.id in self._unsent:
            message = f"A request with id {command.id!r} is running already."
        elif len(command.id) > MAX_REQUEST_ID:
            message = f"The id of a request may have {MAX_REQUEST_ID} characters at most."
        if message:
            yield Failed(command.id, "invalid_request", message)
            return
        loads = _loads_of(command)
        try:
            frame = encode_frame(command)
            self._check_loads(loads)
            # Again if the engine died at once: what ended the streams there did not know of this.
            while self._writer is None:
                if await self._started(command.id):
                    yield _cancelled(command.id)
                    return
        except GryphonError as error:
            yield Failed(command.id, error.code, error.message, error.retry_after)
            return
        events = asyncio.Queue[Event]()
        self._streams[command.id] = _Stream(loads, events)
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

    def _check_loads(self, loads: Loads) -> None:
        deaths = self._load_deaths.get(loads)
        if deaths is not None and deaths.remaining_s:
            raise _crashes_engine(loads, deaths)

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
        self._attached_s = time.monotonic()
        self._listener = asyncio.create_task(self._listen(reader))
        return True

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Hand events to their streams until the connection ends, then fail what is left."""
        try:
            while True:
                event = await read_event(reader)
                if isinstance(event, Welcome):
                    continue
                stream = self._streams.get(event.id)
                self._learn(event, event.id, stream.loads if stream is not None else None)
                if stream is not None:
                    stream.events.put_nowait(event)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            pass
        if self._closed:
            return
        async with self._connecting:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()
            self._note_death()
            how = ""
            if self._owned is not None:
                owned, self._owned = self._owned, None
                how = f" ({await asyncio.to_thread(owned.crashed)})"
        self._fail_streams(
            "engine_crashed",
            f"The engine stopped unexpectedly{how} while this was running. "
            "Nothing you wrote is lost: try again.",
        )

    def _learn(self, event: Event, request_id: str, loads: Loads | None) -> None:
        """Keep what tells later why the engine died, and that it works."""
        if isinstance(event, Progress) and event.phase == "load":
            if loads is not None:
                self._loading = request_id, loads
            return
        if self._loading is not None and self._loading[0] == request_id:
            self._loading = None
        is_loaded = isinstance(event, Accepted)
        if isinstance(event, Finished) and event.reason != "cancelled":
            is_loaded = True
            if event.usage.completion_tokens:
                self._deaths.succeeded()
        if is_loaded and loads is not None:
            self._load_deaths.pop(loads, None)

    def _note_death(self) -> None:
        """Count the death of the engine, and against the model it was loading."""
        self.crashes += 1
        if time.monotonic() - self._attached_s > _STABLE_S:
            self._deaths.succeeded()
        self._deaths.failed()
        if self._loading is not None:
            _, loads = self._loading
            new = Backoff(first_s=30.0, cap_s=600.0)
            self._load_deaths.setdefault(loads, new).failed()
            self._loading = None

    def _fail_streams(self, code: str, message: str) -> None:
        retry_after = max(1.0, self._deaths.remaining_s)
        for request_id, stream in self._streams.items():
            stream.events.put_nowait(Failed(request_id, code, message, retry_after))
