"""The engine process: a UNIX socket in front, one MLX thread behind.

The main thread runs an asyncio loop that talks to clients and has prompts prepared; the
scheduler's thread is the only one that touches MLX. When the parent goes away, however it went, the
pipe it held open closes; this process then ends as soon as no client is connected.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

import app
from app.engine import blas
from app.engine.preparation import Preparer, Prompt, TokenizedPrompt
from app.engine.protocol import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    EngineStatus,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    GetStatus,
    LoadModel,
    Welcome,
    check_keep_alive,
    check_request,
    encode_frame,
    read_command,
)
from app.errors import GryphonError
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.batch import Row
    from app.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Events a client has not read yet; beyond this it is not reading at all.
_MAX_UNREAD_BYTES = 16 * 1024 * 1024
_NO_PROMPT = TokenizedPrompt([], [])


class Connection:
    """One client: its requests by id, and its half of the socket."""

    def __init__(self, engine: Engine, writer: asyncio.StreamWriter) -> None:
        self._engine = engine
        self._writer = writer
        self.rows: dict[str, Row] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def send(self, event: Event) -> None:
        """Queue an event for the client; one that does not read is disconnected."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            logger.warning("a client does not read its events; disconnecting it")
            self._writer.transport.abort()
            return
        self._writer.write(encode_frame(event))

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Handle commands until the client is gone, then cancel what it left running."""
        self.send(Welcome(PROTOCOL_VERSION, app.__version__, os.getpid()))
        try:
            while True:
                command = await read_command(reader)
                if isinstance(command, GetStatus):
                    self.send(self._engine.status(command.id))
                elif isinstance(command, Cancel):
                    self._cancel(command.id)
                elif command.id in self._tasks or command.id in self.rows:
                    message = f"A request with id {command.id!r} is running already."
                    self.send(Failed(command.id, "invalid_request", message))
                elif isinstance(command, LoadModel):
                    self._load(command)
                else:
                    self._start(command)
        except asyncio.IncompleteReadError:
            pass
        except (ConnectionError, ValueError) as error:
            logger.warning("dropping a client: %s", error)
        finally:
            for request_id in [*self._tasks, *self.rows]:
                self._cancel(request_id)
            self._writer.close()

    def _load(self, request: LoadModel) -> None:
        try:
            check_keep_alive(request)
        except GryphonError as error:
            self.send(Failed(request.id, error.code, error.message))
        else:
            self._submit(request, _NO_PROMPT)

    def _start(self, request: GenerationRequest) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.pop(request.id, None)
            if task.cancelled():  # before the scheduler knew of it, perhaps before its first step
                self._row(request, _NO_PROMPT, time.monotonic()).finish("cancelled")

        task = asyncio.create_task(self._prepare(request))
        self._tasks[request.id] = task
        task.add_done_callback(ended)

    async def _prepare(self, request: GenerationRequest) -> None:
        started = time.monotonic()
        try:
            check_request(request)
            if request.prompt_tokens is not None:
                tokenized = TokenizedPrompt(request.prompt_tokens, [])
            else:
                prompt = Prompt(request.model.path, request.messages, request.prompt)
                tokenized = await self._engine.preparer.prepare(prompt)
        except GryphonError as error:
            self.send(Failed(request.id, error.code, error.message, error.retry_after))
        except Exception as error:
            logger.exception("preparing a request failed")
            self.send(Failed(request.id, "engine_error", f"The engine failed: {error}"))
        else:
            self._submit(request, tokenized, started)

    def _row(
        self, request: GenerationRequest | LoadModel, prompt: TokenizedPrompt, started: float
    ) -> Row:
        from app.engine.batch import Row

        emit = functools.partial(self._engine.emit, self)
        return Row(request, emit, prompt.tokens, prompt.boundaries, submitted_s=started)

    def _submit(
        self,
        request: GenerationRequest | LoadModel,
        prompt: TokenizedPrompt,
        started: float | None = None,
    ) -> None:
        row = self._row(request, prompt, started or time.monotonic())
        self.rows[request.id] = row
        self._engine.scheduler.submit(row)

    def _cancel(self, request_id: str) -> None:
        if request_id in self.rows:
            self._engine.scheduler.cancel(self.rows[request_id])
        elif request_id in self._tasks:
            self._tasks[request_id].cancel()


class Engine:
    """The parts of this process, and the way from the MLX thread back to the clients."""

    def __init__(self, backend: blas.Blas, device: str, scheduler: Scheduler) -> None:
        self.connections = 0
        self.preparer = Preparer(Settings.from_environment().prompt_time_limit_s)
        self.scheduler = scheduler
        self._backend = backend
        self._device = device
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()

    def emit(self, connection: Connection, event: Event) -> None:
        """Send an event from any thread."""
        self._loop.call_soon_threadsafe(self._deliver, connection, event)

    def _deliver(self, connection: Connection, event: Event) -> None:
        if isinstance(event, (Finished, Failed)):
            connection.rows.pop(event.id, None)
        if isinstance(event, Accepted) and self._backend.kind == "reference":
            notices = [notice for notice in (self._backend.note, event.notice) if notice]
            event = msgspec.structs.replace(event, notice=" ".join(notices))
        connection.send(event)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        self.connections += 1
        try:
            await Connection(self, writer).serve(reader)
        finally:
            self.connections -= 1

    def status(self, request_id: str) -> EngineStatus:
        """A picture of the engine, taken without waiting for the MLX thread."""
        view = self.scheduler.snapshot
        note = f"{self._backend.note}, {view.note}" if view.note else self._backend.note
        return EngineStatus(
            id=request_id,
            pid=os.getpid(),
            gryphon=app.__version__,
            model=view.model,
            state=view.state,
            device=self._device,
            backend_note=note,
            weight_bytes=view.weight_bytes,
            state_bytes=view.state_bytes,
            prefix_bytes=view.prefix_bytes,
            scratch_bytes=view.scratch_bytes,
            active_bytes=view.active_bytes,
            cache_bytes=view.cache_bytes,
            footprint_bytes=psutil.Process().memory_info().rss,
            budget_bytes=view.budget_bytes,
            running=view.running,
            queued=view.queued,
            uptime_s=time.monotonic() - self._started,
            context_length=view.context_length,
        )


def _run(scheduler: Scheduler) -> None:
    """The MLX thread. Without it nothing would ever be answered, so its end is the process's."""
    try:
        scheduler.run()
    except BaseException:
        logger.critical("the MLX thread failed", exc_info=True)
    os._exit(1)


def _outlive_nobody(alive_fd: int, engine: Engine) -> None:
    """Wait until the parent's end of the pipe closes and every client is gone; then end."""
    with contextlib.suppress(OSError):
        os.read(alive_fd, 1)
    while engine.connections:
        time.sleep(0.05)
    # At once: a computation in progress is of no use to anybody, nor is a prompt in preparation,
    # whose process hears nothing until its time limit. The client made us leader of a group.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


async def _serve(socket_path: Path, alive_fd: int, backend: blas.Blas) -> None:
    import mlx.core as mx

    from app.engine.scheduler import Scheduler

    settings = Settings.from_environment()
    scheduler = Scheduler(settings.prefix_cache_bytes, settings.memory_bytes, settings.keep_alive_s)
    device = "Apple GPU" if mx.default_device() == mx.Device(mx.DeviceType.gpu) else "CPU"
    engine = Engine(backend, device, scheduler)
    threading.Thread(target=_run, args=[scheduler], name="mlx", daemon=True).start()
    threading.Thread(target=_outlive_nobody, args=[alive_fd, engine], daemon=True).start()
    old_mask = os.umask(0o177)  # the socket is 0600 from its first moment
    try:
        server = await asyncio.start_unix_server(engine.connected, path=socket_path)
    finally:
        os.umask(old_mask)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Entry point of the engine process; `app.engine.client` starts it."""
    parser = argparse.ArgumentParser(prog="gryphon-engine")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--alive-fd", type=int, required=True)
    arguments = parser.parse_args()
    level = Settings.from_environment().engine_log_level.upper()
    logging.basicConfig(
        level=level if level in logging.getLevelNamesMapping() else "WARNING",
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    backend = blas.preload()  # before anything imports MLX
    asyncio.run(_serve(arguments.socket, arguments.alive_fd, backend))


if __name__ == "__main__":
    main()
