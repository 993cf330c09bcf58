"""From generation requests to an HTTP answer: what all dialects share.

A dialect turns its request into a `GenerationRequest`, or several of them where it may ask for
several choices, and brings an `Answer`, which spells events in its own words; `GenerationResponse`
does the waiting, the streaming and the cancelling.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.engine.protocol import (
    MAX_CLIENT_CHARACTERS,
    Accepted,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    EngineStatus,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelRef,
    Token,
    Tokenize,
    Tokenized,
    ToolCall,
)
from app.errors import GryphonError
from app.library.infill import infill_models
from app.library.installed import InstalledModel
from app.server.errors import ApiError, internal_error, log_fault, server_stopping

_STATUS_TIMEOUT_S = 0.25


class Engine(Protocol):
    """The part of `EngineClient` that the server uses."""

    @property
    def starts(self) -> int: ...

    @property
    def crashes(self) -> int: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[Event]: ...

    def load(
        self, model: ModelRef, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[Event]: ...

    async def status(self) -> EngineStatus | None: ...

    async def embed(self, request: Embed) -> Embedded: ...

    async def tokenize(self, command: Tokenize) -> Tokenized: ...

    async def detokenize(self, command: Detokenize) -> Detokenized: ...


class Models(Protocol):
    """The part of `app.library.installed` that the server uses."""

    def installed_models(self) -> list[InstalledModel]: ...

    def find_model(
        self, name: str | None = None, *, allow_path: bool = False
    ) -> InstalledModel: ...


MAX_UNREAD_BYTES = 4 * 1024 * 1024
"""Of an answer, waiting for a client that does not read: minutes of it. The engine does not wait
for one client, since its rows compute together; one that is further behind is let go."""

_EVENT_BYTES = 256


class Ending:
    """Tells the answers under way when the server stops, so that each can end in its own words."""

    def __init__(self) -> None:
        self.has_begun = False
        self._told: set[Callable[[], None]] = set()

    def begin(self) -> None:
        """Tell them, and those that come later at once. Idempotent."""
        self.has_begun = True
        for tell in list(self._told):
            tell()

    @contextmanager
    def telling(self, tell: Callable[[], None]) -> Iterator[None]:
        """Have `tell` called when it begins, from the event loop."""
        self._told.add(tell)
        try:
            if self.has_begun:
                tell()
            yield
        finally:
            self._told.remove(tell)


@dataclass(frozen=True)
class Backend:
    """What a dialect answers from."""

    engine: Engine
    models: Models
    keep_alive_s: float
    ending: Ending = field(default_factory=Ending)

    async def installed_models(self) -> list[InstalledModel]:
        # Reading the models' files takes milliseconds to seconds: not on the event loop.
        return await asyncio.to_thread(self.models.installed_models)

    async def find_model(self, name: str) -> InstalledModel:
        """The installed model of that name; a path is never looked at.

        Raises:
            GryphonError: there is none.
        """
        return await asyncio.to_thread(self.models.find_model, name)

    async def model_of(self, name: str | None) -> InstalledModel:
        """The model of that name; without one the resident model, else the default one.

        Raises:
            GryphonError: there is none.
        """
        if name:
            return await self.find_model(name)
        status = await self.status()
        if status is not None and status.model is not None:
            # It may have been removed since it was loaded.
            with contextlib.suppress(GryphonError):
                return await self.find_model(status.model.name)
        return await asyncio.to_thread(self.models.find_model, None)

    async def status(self) -> EngineStatus | None:
        """The engine's status; None where none runs or it does not say so at once."""
        with contextlib.suppress(TimeoutError, ConnectionError, GryphonError):
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await self.engine.status()
        return None

    async def explained(self, error: ApiError) -> ApiError:
        """An error of the engine's with what only this side of it knows."""
        if error.code != "no_infill":
            return error
        names = await asyncio.to_thread(lambda: infill_models(self.models.installed_models()))
        can = f"Installed models that can: {', '.join(names)}."
        can = can if names else "No installed model can."
        return ApiError(error.status, error.code, f"{error.message} {can}")


@dataclass
class Choice:
    """One answer of a request, as it came out of the engine."""

    tokens: list[Token] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finished: Finished | None = None
    """Set when it is whole."""

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.end.text

    @property
    def reasoning(self) -> str:
        return "".join(token.reasoning for token in self.tokens) + self.end.reasoning

    @property
    def end(self) -> Finished:
        """How it ended; only of a whole one."""
        assert self.finished is not None, "not whole"
        return self.finished


class Answer(Protocol):
    """How a dialect spells an answer, streamed (`opening` … `closing`) or `whole`.

    An answer has as many choices as requests were made for it, numbered from 0; those that are
    streamed at once come mixed.
    """

    stream_media_type: str

    @property
    def keep_alive(self) -> bytes:
        """What clients skip, sent while nothing else is."""
        ...

    def opening(self, accepted: Accepted | None) -> bytes:
        """Sent first.

        Args:
            accepted: What is known of the first request's prompt; None where the engine took so
                long that the stream begins with a keep-alive.
        """
        ...

    def piece(self, event: Token | ToolCall, choice: int) -> bytes:
        """Sent for one token or tool call; empty when it has nothing to show yet."""
        ...

    def ended(self, finished: Finished, choice: int) -> bytes:
        """Sent for the end of one choice; nothing more of it follows."""
        ...

    def closing(self, ends: Sequence[Finished]) -> bytes:
        """Sent last, after the end of every choice; `ends` are in the order of the choices."""
        ...

    def broken(self, error: ApiError) -> bytes:
        """Sent last instead when generation fails midway."""
        ...

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The JSON body when nothing was streamed."""
        ...


def client_of(request: Request) -> str:
    """Who asks, for fairness and for `gryphon ps`: the address and the program's own name.

    Programs on one machine share an address and an API key, and an editor that completes must not
    wait for a batch job of another program; so they are told apart by User-Agent. It can be forged,
    which gains a client a second place in the queue and no more.
    """
    address = request.client.host if request.client else "socket"
    product = request.headers.get("user-agent", "").partition(" ")[0]
    name = f"{address} {product}".strip()[:MAX_CLIENT_CHARACTERS]
    return "".join(character if character.isprintable() else "?" for character in name)


async def _events(engine: Engine, request: GenerationRequest) -> AsyncIterator[Event]:
    """The engine's events; any way of ending that breaks its contract becomes a `Failed`."""
    try:
        await engine.start()
        # An async generator in fact, as EngineClient.stream promises by its `aclose`.
        stream = cast("AsyncGenerator[Event, None]", engine.stream(request))
        async with aclosing(stream) as events:
            async for event in events:
                yield event
                if isinstance(event, Finished | Failed):
                    return
        yield Failed(request.id, "engine_crashed", "The engine stopped answering; try again.")
    except GryphonError as error:
        yield Failed(request.id, error.code, error.message, error.retry_after)
    except Exception as error:
        log_fault(f"request {request.id} failed", error)
        internal = internal_error()
        yield Failed(request.id, internal.code, internal.message)


_Heard = Accepted | Token | ToolCall | Finished | Failed


async def audible(
    backend: Backend, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, _Heard | None], None]:
    """What a client hears of each request, with its number, up to all ends or the first failure.

    The event is None whenever `backend.keep_alive_s` passed without any token, tool call or end.
    It fails where more than MAX_UNREAD_BYTES wait to be taken, and when the server stops. Closing
    the generator cancels the requests.
    """
    # One task per request runs the engine's iterator from first to last step, so that a wait which
    # times out never cancels it. The tasks take events as they come: where they wait for a slow
    # client, here or in the engine's client, is all the same, and here they are counted.
    queue: asyncio.Queue[tuple[int, _Heard]] = asyncio.Queue()
    unread = 0

    async def forward(number: int, request: GenerationRequest) -> None:
        nonlocal unread
        async with aclosing(
            cast("AsyncGenerator[Event, None]", _events(backend.engine, request))
        ) as events:
            async for event in events:
                # Progress does not count: a client needs to hear something all the same.
                if not isinstance(event, _Heard):
                    continue
                unread += _size(event)
                if unread > MAX_UNREAD_BYTES:
                    queue.put_nowait((number, _too_slow(request)))
                    return
                queue.put_nowait((number, event))
                if queue.qsize() > 1:
                    await asyncio.sleep(0)  # an engine that never waits leaves a turn to others

    def end() -> None:
        queue.put_nowait((0, _stopping(requests[0])))

    forwarding = [asyncio.create_task(forward(*one)) for one in enumerate(requests)]
    running = len(requests)
    try:
        with backend.ending.telling(end):
            heard_at = asyncio.get_running_loop().time()
            while running:
                try:
                    async with asyncio.timeout_at(heard_at + backend.keep_alive_s):
                        number, event = await queue.get()
                except TimeoutError:
                    yield 0, None
                    heard_at = asyncio.get_running_loop().time()
                    continue
                unread -= _size(event)
                yield number, event
                if isinstance(event, Failed):
                    return
                if not isinstance(event, Accepted):
                    heard_at = asyncio.get_running_loop().time()
                running -= isinstance(event, Finished)
    finally:
        for task in forwarding:
            task.cancel()
        await asyncio.wait(forwarding)


def _size(event: _Heard) -> int:
    """About how many bytes an event takes."""
    match event:
        case Token():
            text = len(event.text) + len(event.reasoning)
            return _EVENT_BYTES * (1 + len(event.top)) + text
        case ToolCall():
            return _EVENT_BYTES + len(event.arguments)
    return _EVENT_BYTES


def _too_slow(request: GenerationRequest) -> Failed:
    return Failed(
        request.id,
        "client_too_slow",
        f"This client is more than {MAX_UNREAD_BYTES // 2**20} MiB behind its answer, which was "
        "therefore ended. Read it as it comes.",
    )


def _stopping(request: GenerationRequest) -> Failed:
    error = server_stopping()
    return Failed(request.id, error.code, error.message)


def _failure(event: _Heard | None) -> ApiError | None:
    """The error that `event` stands for, if it does."""
    if isinstance(event, Failed):
        return ApiError.of(event)
    if isinstance(event, Finished) and event.reason == "cancelled":
        # By somebody else, for example an engine that shuts down: the client is still waiting
        # and must not take half an answer for a whole one.
        failed = Failed(event.id, "cancelled", "The answer was cancelled; try again.")
        return ApiError.of(failed)
    return None


class GenerationResponse(Response):
    """Generates while it is being sent. A client that goes away cancels the requests."""

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[GenerationRequest],
        answer: Answer,
        *,
        stream: bool,
    ) -> None:
        self.backend = backend
        self.requests = requests
        self.answer = answer
        self.stream = stream
        self.background = None
        self.status_code = 200
        self.media_type = answer.stream_media_type if stream else "application/json"
        headers = {"x-request-id": requests[0].id}
        if stream:
            headers["cache-control"] = "no-cache"
        self.body = b""
        self.init_headers(headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._stream(send) if self.stream else self._whole(send))
        leaving = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.wait({answering, leaving})
        if not answering.cancelled():
            answering.result()

    def _audible(self) -> AsyncGenerator[tuple[int, _Heard | None], None]:
        return audible(self.backend, self.requests)

    async def _whole(self, send: Send) -> None:
        choices = [Choice() for _ in self.requests]
        async with aclosing(self._audible()) as events:
            async for number, event in events:
                if error := _failure(event):
                    raise await self.backend.explained(error)
                match event:
                    case Token():
                        choices[number].tokens.append(event)
                    case ToolCall():
                        choices[number].tool_calls.append(event)
                    case Finished():
                        choices[number].finished = event
        body = self.answer.whole(choices)
        self.headers["content-length"] = str(len(body))
        await self._start(send)
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        accepted: Accepted | None = None
        ends: dict[int, Finished] = {}
        started = False
        async with aclosing(self._audible()) as events:
            async for number, event in events:
                if isinstance(event, Accepted):
                    accepted = accepted or event
                    continue
                error = _failure(event)
                # The status waits for the first token, since loading and prefill are where requests
                # fail, but not longer than the first keep-alive: after that errors come as frames.
                if not started:
                    if error is not None:
                        raise await self.backend.explained(error)
                    await self._start(send)
                    await _send_part(send, self.answer.opening(accepted))
                    started = True
                if error is not None:
                    await _send_part(send, self.answer.broken(error))
                    break
                await _send_part(send, self._frames(event, number))
                if isinstance(event, Finished):
                    ends[number] = event
        if len(ends) == len(self.requests):
            in_order = [ends[number] for number in range(len(ends))]
            await _send_part(send, self.answer.closing(in_order))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _frames(self, event: _Heard | None, choice: int) -> bytes:
        match event:
            case Token() | ToolCall():
                return self.answer.piece(event, choice)
            case Finished():
                return self.answer.ended(event, choice)
            case _:
                return self.answer.keep_alive

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )


async def _send_part(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def client_left(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
