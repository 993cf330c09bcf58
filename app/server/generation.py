"""From a generation request to an HTTP answer: what all dialects share.

A dialect turns its request into a `GenerationRequest` and brings an `Answer`, which spells events
in its own words; `GenerationResponse` does the waiting, the streaming and the cancelling.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.engine.protocol import EngineStatus, Event, Failed, Finished, GenerationRequest, Token
from app.errors import GryphonError
from app.library.installed import InstalledModel
from app.server.errors import ApiError, internal_error, log_fault


class Engine(Protocol):
    """The part of `EngineClient` that the server uses."""

    @property
    def starts(self) -> int: ...

    @property
    def crashes(self) -> int: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[Event]: ...

    async def status(self) -> EngineStatus | None: ...


class Models(Protocol):
    """The part of `app.library.installed` that the server uses."""

    def installed_models(self) -> list[InstalledModel]: ...

    def find_model(
        self, name: str | None = None, *, allow_path: bool = False
    ) -> InstalledModel: ...


@dataclass(frozen=True)
class Backend:
    """What a dialect answers from."""

    engine: Engine
    models: Models
    keep_alive_s: float

    async def installed_models(self) -> list[InstalledModel]:
        # Reading the models' files takes milliseconds to seconds: not on the event loop.
        return await asyncio.to_thread(self.models.installed_models)

    async def find_model(self, name: str) -> InstalledModel:
        """The installed model of that name; a path is never looked at.

        Raises:
            GryphonError: there is none.
        """
        return await asyncio.to_thread(self.models.find_model, name)


class Answer(Protocol):
    """How a dialect spells one answer, streamed (`opening` … `closing`) or whole."""

    stream_media_type: str
    keep_alive: bytes
    """Bytes that clients skip, sent while nothing else is."""

    def opening(self) -> bytes:
        """Sent before the first token."""
        ...

    def token(self, token: Token) -> bytes:
        """Sent for one token; empty when it has nothing to show yet."""
        ...

    def closing(self, finished: Finished) -> bytes:
        """Sent last."""
        ...

    def broken(self, error: ApiError) -> bytes:
        """Sent last instead of `closing` when generation fails midway."""
        ...

    def whole(self, tokens: list[Token], finished: Finished) -> bytes:
        """The JSON body when nothing was streamed."""
        ...


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


async def audible(
    engine: Engine, request: GenerationRequest, silence_s: float
) -> AsyncGenerator[Token | Finished | Failed | None, None]:
    """Tokens and the end of one request; None whenever `silence_s` passed without any.

    Closing the generator cancels the request.
    """
    # One task runs the engine's iterator from first to last step, so that a wait which times out
    # never cancels it. A queue of one: a slow reader of ours is a slow reader of the engine's.
    queue: asyncio.Queue[Token | Finished | Failed] = asyncio.Queue(maxsize=1)

    async def forward() -> None:
        async with aclosing(
            cast("AsyncGenerator[Event, None]", _events(engine, request))
        ) as events:
            async for event in events:
                # Progress does not count: a client needs to hear something all the same.
                if isinstance(event, Token | Finished | Failed):
                    await queue.put(event)

    forwarding = asyncio.create_task(forward())
    try:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    event = await queue.get()
            except TimeoutError:
                yield None
                continue
            yield event
            if isinstance(event, Finished | Failed):
                return
    finally:
        forwarding.cancel()
        await asyncio.wait({forwarding})


def _failure(event: Token | Finished | Failed | None) -> ApiError | None:
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
    """Generates while it is being sent. A client that goes away cancels the request."""

    def __init__(
        self, backend: Backend, request: GenerationRequest, answer: Answer, *, stream: bool
    ) -> None:
        self.backend = backend
        self.request = request
        self.answer = answer
        self.stream = stream
        self.background = None
        self.status_code = 200
        self.media_type = answer.stream_media_type if stream else "application/json"
        headers = {"x-request-id": request.id}
        if stream:
            headers["cache-control"] = "no-cache"
        self.body = b""
        self.init_headers(headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._stream(send) if self.stream else self._whole(send))
        leaving = asyncio.create_task(_client_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.wait({answering, leaving})
        if not answering.cancelled():
            answering.result()

    def _audible(self) -> AsyncGenerator[Token | Finished | Failed | None, None]:
        return audible(self.backend.engine, self.request, self.backend.keep_alive_s)

    async def _whole(self, send: Send) -> None:
        tokens: list[Token] = []
        async with aclosing(self._audible()) as events:
            async for event in events:
                if error := _failure(event):
                    raise error
                if isinstance(event, Token):
                    tokens.append(event)
                elif isinstance(event, Finished):
                    body = self.answer.whole(tokens, event)
                    self.headers["content-length"] = str(len(body))
                    await self._start(send)
                    await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._audible()) as events:
            # The status waits for the first token, since loading and prefill are where requests
            # fail, but not longer than the first keep-alive: after that errors come as frames.
            first = await anext(events)
            if error := _failure(first):
                raise error
            await self._start(send)
            await _send_part(send, self.answer.opening())
            await _send_part(send, self._frames(first))
            async for event in events:
                await _send_part(send, self._frames(event))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _frames(self, event: Token | Finished | Failed | None) -> bytes:
        if error := _failure(event):
            return self.answer.broken(error)
        match event:
            case Token():
                return self.answer.token(event)
            case Finished():
                return self.answer.closing(event)
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


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
