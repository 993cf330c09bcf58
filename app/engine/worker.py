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
import itertools
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

import app
from app import last_used, paths, settings_file
from app.engine import blas
from app.engine.call_grammar import not_enforced
from app.engine.ledger import Ledger
from app.engine.matcher import Matcher, Matchers
from app.engine.prefix_files import PrefixFiles
from app.engine.preparation_pool import PreparationPool
from app.engine.preparation_work import Prompt, TokenizedPrompt
from app.engine.protocol import (
    MAX_REQUEST_ID,
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    Detokenize,
    Embed,
    EngineStatus,
    Event,
    Failed,
    Finished,
    ForgetChat,
    GenerationRequest,
    GetStatus,
    LoadModel,
    Timings,
    Tokenize,
    Usage,
    Welcome,
    check_chat,
    check_embed,
    check_keep_alive,
    check_model,
    check_request,
    encode_frame,
    read_command,
)
from app.engine.token_answers import detokenized, embed_inputs, tokenized
from app.errors import GryphonError, readable
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.batch import Row
    from app.engine.embedding import Embedding
    from app.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Events a client has not read yet; beyond this it is not reading at all.
_MAX_UNREAD_BYTES = 16 * 1024 * 1024
# One event larger than this is an answer by itself; a client that reads takes its time over some.
_LARGE_BYTES = 1024 * 1024
_MAX_LARGE_BYTES = 128 * 1024 * 1024
# What a restart finds again is saved when the engine is idle; this is for what came after that.
_SAVE_S = 0.4
_NO_PROMPT = TokenizedPrompt([], [])


@dataclass(eq=False)
class _Preparing:
    """A request that the scheduler does not know yet."""

    chat: str
    is_forgotten: bool = False
    """Its chat was purged meanwhile."""


class Connection:
    """One client: its requests by id, and its half of the socket."""

    def __init__(self, engine: Engine, writer: asyncio.StreamWriter, name: str) -> None:
        self.name = name
        self._engine = engine
        self._writer = writer
        self.rows: dict[str, Row] = {}
        self.forgetting: set[str] = set()
        """Ids of chats' purges under way."""
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._large_bytes = 0
        """Of large events since everything had been read."""

    def send(self, event: Event) -> None:
        """Queue an event of a request for the client."""
        self._engine.ledger.saw(self.name, event)
        self._write(event)

    def _write(self, event: Event) -> None:
        """Queue an event; a client that does not read is disconnected."""
        if self._writer.is_closing():
            return
        unread = self._writer.transport.get_write_buffer_size()
        self._large_bytes = self._large_bytes if unread else 0
        if unread > _MAX_UNREAD_BYTES + min(self._large_bytes, _MAX_LARGE_BYTES):
            logger.warning("a client does not read its events; disconnecting it")
            self._writer.transport.abort()
            return
        if isinstance(event, Failed):
            event = msgspec.structs.replace(event, message=readable(event.message))
        frame = encode_frame(event)
        self._large_bytes += len(frame) if len(frame) > _LARGE_BYTES else 0
        self._writer.write(frame)

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Handle commands until the client is gone, then cancel what it left running."""
        self._write(Welcome(PROTOCOL_VERSION, app.__version__, os.getpid()))
        try:
            while True:
                command = await read_command(reader)
                if len(command.id) > MAX_REQUEST_ID:
                    raise ValueError(f"an id has {len(command.id)} characters")
                if isinstance(command, GetStatus):
                    self._write(self._engine.status(command.id))
                elif isinstance(command, Cancel):
                    self._cancel(command.id)
                elif command.id in self.rows.keys() | self._tasks.keys() | self.forgetting:
                    message = f"A request with id {command.id!r} is running already."
                    self._engine.ledger.refused("invalid_request")
                    self._write(Failed(command.id, "invalid_request", message))
                elif isinstance(command, ForgetChat):
                    self._forget(command)
                elif isinstance(command, (Tokenize, Detokenize)):
                    self._answer(command)
                else:
                    self._engine.ledger.began(self.name, command)
                    if isinstance(command, LoadModel):
                        self._load(command)
                    else:
                        self._start(command)
        except asyncio.IncompleteReadError:
            pass
        except (ConnectionError, ValueError, RecursionError) as error:
            logger.warning("dropping a client: %s", error)
        finally:
            for request_id in [*self._tasks, *self.rows]:
                self._cancel(request_id)
            self._writer.close()

    def _load(self, request: LoadModel) -> None:
        try:
            check_model(request.model)
            check_keep_alive(request.keep_alive_s)
        except GryphonError as error:
            self.send(Failed(request.id, error.code, error.message))
        else:
            self._submit(self._row(request, _NO_PROMPT, time.monotonic()))

    def _answer(self, command: Tokenize | Detokenize) -> None:
        """Answer a question of text and tokens; the scheduler never knows of it."""

        async def answer() -> Event:
            pool, client = self._engine.preparation, command.client or self.name
            if isinstance(command, Tokenize):
                return await tokenized(command, pool, client)
            return await detokenized(command, pool, client)

        def ended(task: asyncio.Task[Event]) -> None:
            del self._tasks[command.id]
            if task.cancelled():
                event: Event = Failed(command.id, "cancelled", "It was cancelled; ask again.")
            elif error := task.exception():
                if not isinstance(error, GryphonError):
                    logger.error("a question of tokens failed", exc_info=error)
                    error = GryphonError("engine_error", f"The engine failed: {error}")
                self._engine.ledger.refused(error.code)
                event = Failed(command.id, error.code, error.message, error.retry_after)
            else:
                event = task.result()
            self._write(event)

        task = self._tasks[command.id] = asyncio.create_task(answer())
        task.add_done_callback(ended)

    def _start(self, request: GenerationRequest | Embed) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.pop(request.id, None)
            if task.cancelled():  # before the scheduler knew of it, perhaps before its first step
                self._row(request, _NO_PROMPT, time.monotonic()).finish("cancelled")

        task = asyncio.create_task(self._prepare(request))
        self._tasks[request.id] = task
        task.add_done_callback(ended)

    async def _prepare(self, request: GenerationRequest | Embed) -> None:
        started = time.monotonic()
        preparing = _Preparing(getattr(request, "chat", ""))
        self._engine.preparing.add(preparing)
        embedding, matcher = None, None
        try:
            if isinstance(request, Embed):
                embedding = await self._embedding(request)
                prompt = TokenizedPrompt(embedding.longest, [])
            else:
                prompt = await self._prompt(request)
                # Last: from here on it belongs to the row.
                matcher = await self._matcher(request, prompt)
        except GryphonError as error:
            self.send(Failed(request.id, error.code, error.message, error.retry_after))
        except Exception as error:
            logger.exception("preparing a request failed")
            self.send(Failed(request.id, "engine_error", f"The engine failed: {error}"))
        else:
            row = self._row(request, prompt, started)
            row.matcher, row.is_forgotten = matcher, preparing.is_forgotten
            row.embedding = embedding
            self._submit(row)
        finally:
            self._engine.preparing.discard(preparing)

    async def _prompt(self, request: GenerationRequest) -> TokenizedPrompt:
        check_request(request)
        if request.prompt_tokens is not None:
            return TokenizedPrompt(request.prompt_tokens, [])
        client = request.client or self.name
        return await self._engine.preparation.prepare(_prompt_of(request), client)

    async def _embedding(self, request: Embed) -> Embedding:
        from app.engine.embedding import Embedding

        check_embed(request)
        client = request.client or self.name
        inputs = await embed_inputs(request, self._engine.preparation, client)
        return Embedding(inputs, request.pooling)

    async def _matcher(self, request: GenerationRequest, prompt: TokenizedPrompt) -> Matcher | None:
        path, matchers = request.model.path, self._engine.matchers
        if request.constraint is not None:
            return await matchers.start(path, request.constraint)
        if prompt.call is None:
            return None
        try:
            return await matchers.start(path, prompt.call)
        except GryphonError as error:
            raise not_enforced(request.tool_choice, error) from error

    def _row(
        self,
        request: GenerationRequest | Embed | LoadModel,
        prompt: TokenizedPrompt,
        started: float,
    ) -> Row:
        from app.engine.batch import Row

        emit = functools.partial(self._engine.emit, self)
        tokens, boundaries, format, notice, _, ends = prompt
        row = Row(request, emit, tokens, boundaries, format, notice, connection=self.name)
        row.submitted_s, row.ends = started, frozenset(ends)
        return row

    def _submit(self, row: Row) -> None:
        request = row.request
        last_used.mark(request.model.name)
        self.rows[request.id] = row
        self._engine.ledger.queued(self.name, request.id)
        self._engine.scheduler.submit(row)

    def _forget(self, command: ForgetChat) -> None:
        def ended(error: GryphonError | None) -> None:
            event: Event = Finished(command.id, "stop", Usage(0, 0, 0), Timings(0.0, 0.0, 0.0))
            if error is not None:
                event = Failed(command.id, error.code, error.message)
            self._engine.emit(self, event)

        try:
            check_chat(command.chat)
        except GryphonError as error:
            self.send(Failed(command.id, error.code, error.message))
        else:
            for preparing in self._engine.preparing:
                if command.chat in ("", preparing.chat):
                    preparing.is_forgotten = True
            self.forgetting.add(command.id)
            self._engine.scheduler.forget(command.chat, ended)

    def _cancel(self, request_id: str) -> None:
        if request_id in self.rows:
            self._engine.scheduler.cancel(self.rows[request_id])
        elif request_id in self._tasks:
            self._tasks[request_id].cancel()


def _prompt_of(request: GenerationRequest) -> Prompt:
    return Prompt(
        request.model.path,
        request.messages,
        request.prompt,
        [] if request.tool_choice == "none" else request.tools,
        request.template_options,
        request.tool_choice,
        request.suffix,
        request.infill,
    )


class Engine:
    """The parts of this process, and the way from the MLX thread back to the clients."""

    def __init__(self, backend: blas.Blas, device: str, scheduler: Scheduler) -> None:
        self.connections = 0
        self.preparing: set[_Preparing] = set()
        """Of all connections: a chat may be purged over another than its own."""
        self.matchers = Matchers()
        self.ledger = Ledger()
        self.preparation = PreparationPool(Settings.from_environment().prompt_time_limit_s)
        self.scheduler = scheduler
        self._backend = backend
        self._device = device
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._names = itertools.count(1)
        scheduler.on_idle = self._went_idle

    def emit(self, connection: Connection, event: Event) -> None:
        """Send an event from any thread."""
        self._loop.call_soon_threadsafe(self._deliver, connection, event)

    def _deliver(self, connection: Connection, event: Event) -> None:
        if isinstance(event, (Finished, Failed)):
            connection.rows.pop(event.id, None)
            connection.forgetting.discard(event.id)
        if isinstance(event, Accepted) and self._backend.kind == "reference":
            notice = " ".join(filter(None, [self._backend.note, event.notice]))
            event = msgspec.structs.replace(event, notice=notice)
        connection.send(event)

    def _went_idle(self) -> None:
        """The model was unloaded: what constraints need of it goes too. From the MLX thread."""
        asyncio.run_coroutine_threadsafe(self.matchers.close(), self._loop)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        self.connections += 1
        try:
            await Connection(self, writer, f"connection {next(self._names)}").serve(reader)
        finally:
            self.connections -= 1

    def status(self, request_id: str) -> EngineStatus:
        """A picture of the engine, taken without waiting for the MLX thread."""
        view = self.scheduler.snapshot
        note = f"{self._backend.note}, {view.note}" if view.note else self._backend.note
        left_s = None if view.unload_s is None else max(0.0, view.unload_s - time.monotonic())
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
            keep_alive_left_s=left_s,
            requests=self.ledger.statuses(),
            counters=self.ledger.counters(self.scheduler.model_loads),
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
    while True:
        while engine.connections:
            time.sleep(0.05)
        engine.scheduler.save_prefixes(_SAVE_S)
        if not engine.connections:  # nobody came meanwhile
            break
    # At once: a computation in progress is of no use to anybody, nor is a prompt in preparation,
    # whose process hears nothing until its time limit. The client made us leader of a group.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _prefix_files(settings: Settings) -> PrefixFiles | None:
    """Where states are kept over a restart; what an earlier engine left unfinished is removed."""
    disk_bytes = 0 if settings.prefix_cache_bytes == 0 else settings.prefix_disk_bytes
    try:
        files = PrefixFiles(paths.prefix_dir(), disk_bytes)
        files.clean()
    except (GryphonError, OSError) as error:
        logger.warning("nothing is kept on disk: %s", error)
        return None
    return files


async def _serve(socket_path: Path, alive_fd: int, backend: blas.Blas) -> None:
    import mlx.core as mx

    from app.engine.scheduler import Scheduler

    settings = Settings.from_environment()
    scheduler = Scheduler(
        settings.prefix_cache_bytes,
        _prefix_files(settings),
        memory_bytes=settings.memory_bytes,
        keep_alive_s=settings_file.keep_alive_s(),
    )
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
