"""The engine as its faces see it, scripted: no MLX, no process, no clock."""

from __future__ import annotations

import array
import asyncio
import math
from collections.abc import AsyncIterator, Sequence

import msgspec

from app.engine.protocol import (
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
    Progress,
    Timings,
    Token,
    Tokenize,
    Tokenized,
    TokenLogprob,
    Usage,
)
from app.errors import GryphonError


class FakeEngine:
    """An `EngineClient` that answers from a script.

    `answers` holds, per coming request, a list of pieces: a str becomes a `Token`, an event goes
    out as it is (its id filled in), an `asyncio.Event` is waited for. After the pieces the request
    finishes by itself unless a piece was terminal. Requests made are kept in `requests`, models
    loaded in `loads` with how long they are to stay, cancelled ids in `cancelled`, forgotten chats
    in `forgotten`.

    A text has one token per byte, whose id is the byte. An input's vector is what its bytes count,
    of length 1: as many numbers as `dimensions`. `refuses` is raised by the next that is no stream.
    """

    def __init__(self, answers: Sequence[Sequence[str | Event | asyncio.Event]] = ()) -> None:
        self.answers = list(answers)
        self.requests: list[GenerationRequest] = []
        self.loads: list[tuple[ModelRef, float | None]] = []
        self.cancelled: list[str] = []
        self.forgotten: list[str] = []
        self.starts = 0
        self.crashes = 0
        self.asked: list[Embed | Tokenize | Detokenize] = []
        self.refuses: GryphonError | None = None
        self.hold: asyncio.Event | None = None
        """What a request for embeddings waits for."""
        self.dimensions = 4
        self.prompt_tokens = 7
        self.context_length: int | None = 8192
        self.started = False
        self.closed = False
        self._cancel_events: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True

    async def forget_chat(self, chat: str) -> None:
        self.forgotten.append(chat)

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        if request_id in self._cancel_events:
            self._cancel_events[request_id].set()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        pieces = self.answers.pop(0) if self.answers else ["Hello", " there", "."]
        cancel = self._cancel_events[request.id] = asyncio.Event()
        count = 0

        def finished(reason: str) -> Finished:
            return Finished(
                id=request.id,
                reason=reason,  # type: ignore[arg-type]
                usage=Usage(self.prompt_tokens, count, 0),
                timings=Timings(queue_s=0.0, prefill_s=0.1, decode_s=0.1 * max(count - 1, 0)),
            )

        terminal = False
        try:
            yield Accepted(
                id=request.id,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=0,
                context_length=self.context_length,
            )
            for piece in pieces:
                if isinstance(piece, asyncio.Event):
                    gate = asyncio.ensure_future(piece.wait())
                    stop = asyncio.ensure_future(cancel.wait())
                    await asyncio.wait({gate, stop}, return_when=asyncio.FIRST_COMPLETED)
                    gate.cancel()
                    stop.cancel()
                if cancel.is_set():
                    terminal = True
                    yield finished("cancelled")
                    return
                if isinstance(piece, str):
                    logprob = None
                    if request.logprobs:
                        logprob = TokenLogprob(count, piece, piece.encode(), -0.5)
                    yield Token(
                        id=request.id,
                        text=piece,
                        token_id=count,
                        logprob=logprob,
                        top=[logprob] * request.top_logprobs if logprob else [],
                    )
                    count += 1
                    if request.max_tokens is not None and count >= request.max_tokens:
                        terminal = True
                        yield finished("length")
                        return
                elif not isinstance(piece, asyncio.Event):
                    terminal = isinstance(piece, (Finished, Failed))
                    yield msgspec.structs.replace(piece, id=request.id)  # type: ignore[type-var]
                    if terminal:
                        return
            terminal = True
            yield finished("stop")
        finally:
            if not terminal:
                self.cancelled.append(request.id)

    def _ask(self, command: Embed | Tokenize | Detokenize) -> None:
        self.asked.append(command)
        if self.refuses is not None:
            raise self.refuses

    async def embed(self, request: Embed) -> Embedded:
        self._ask(request)
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled.append(request.id)
                raise
        inputs = request.tokens or [[*text.encode()] for text in request.texts or []]
        vectors = array.array("f")
        for tokens in inputs:
            counts = [sum(id % self.dimensions == i for id in tokens) for i in range(4)]
            length = math.hypot(*counts)
            vectors.extend(count / length for count in counts[: self.dimensions])
        lengths = [len(tokens) for tokens in inputs]
        return Embedded(request.id, vectors.tobytes(), self.dimensions, lengths)

    async def tokenize(self, command: Tokenize) -> Tokenized:
        self._ask(command)
        said = [message.content for message in command.messages or []]
        ids = [*(command.text or "".join(said)).encode()]
        return Tokenized(
            command.id, ids, [bytes([id]) for id in ids] if command.with_pieces else None
        )

    async def detokenize(self, command: Detokenize) -> Detokenized:
        self._ask(command)
        spelled = bytes(id % 256 for id in command.tokens)
        return Detokenized(command.id, spelled.decode(errors="replace"))

    async def load(
        self, model: ModelRef, *, keep_alive_s: float | None = None
    ) -> AsyncIterator[Event]:
        self.loads.append((model, keep_alive_s))
        yield Progress(id="load", phase="load", processed=1, total=1, detail=model.name)
        yield Finished(
            id="load", reason="stop", usage=Usage(0, 0, 0), timings=Timings(0.0, 0.0, 0.0)
        )

    async def status(self) -> EngineStatus | None:
        model = self.requests[-1].model if self.requests else None
        return EngineStatus(
            id="status",
            pid=1,
            gryphon="0.0.0",
            model=model,
            state="ready" if model else "unloaded",
            device="cpu",
            backend_note="scripted",
            weight_bytes=0,
            state_bytes=0,
            active_bytes=0,
            running=0,
            queued=0,
            uptime_s=1.0,
            context_length=self.context_length,
        )
