"""What crosses the boundary between a face and the engine process.

One frame is a 4-byte big-endian length and that many bytes of MessagePack: a tagged `Command`
towards the engine, a tagged `Event` from it. One connection carries any number of requests, told
apart by an `id` of at most `MAX_REQUEST_ID` characters that the client chooses. Every request ends
in exactly one `Finished` or `Failed`; questions of text and tokens (`Tokenize`, `Detokenize`), in
one answer of their own or a `Failed`.
No MLX here, nor anything that imports it.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Literal

import msgspec

from app.engine.conversation import Message as Message
from app.engine.conversation import Tool as Tool
from app.engine.conversation import ToolCallPart as ToolCallPart
from app.engine.embed_request import Embed as Embed
from app.engine.embed_request import Embedded as Embedded
from app.engine.embed_request import check_embed as check_embed
from app.engine.request_checks import MAX_CLIENT_CHARACTERS as MAX_CLIENT_CHARACTERS
from app.engine.request_checks import MAX_REQUEST_ID as MAX_REQUEST_ID
from app.engine.request_checks import check_chat as check_chat
from app.engine.request_checks import check_keep_alive as check_keep_alive
from app.engine.request_checks import check_model as check_model
from app.engine.request_checks import check_request as check_request
from app.engine.request_checks import check_sampling as check_sampling
from app.engine.requests import HOUSE_SAMPLING as HOUSE_SAMPLING
from app.engine.requests import ContextFile as ContextFile
from app.engine.requests import DraftModel as DraftModel
from app.engine.requests import GenerationRequest as GenerationRequest
from app.engine.requests import Infill as Infill
from app.engine.requests import ModelRef as ModelRef
from app.engine.requests import PromptLookup as PromptLookup
from app.engine.requests import Sampling as Sampling
from app.engine.token_commands import Detokenize as Detokenize
from app.engine.token_commands import Detokenized as Detokenized
from app.engine.token_commands import Tokenize as Tokenize
from app.engine.token_commands import Tokenized as Tokenized
from app.errors import GryphonError

PROTOCOL_VERSION = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
ModelState = Literal["unloaded", "loading", "ready"]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a request early: it finishes with reason "cancelled". Unknown ids are ignored."""

    id: str


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    """Make a model resident without generating; ends in `Finished` or `Failed`."""

    id: str
    model: ModelRef
    keep_alive_s: float | None = None
    """As in `GenerationRequest`."""


class GetStatus(msgspec.Struct, frozen=True, tag="status"):
    """Ask for one `EngineStatus`. Answered at once, whatever the engine is computing."""

    id: str


class ForgetChat(msgspec.Struct, frozen=True, tag="forget"):
    """Drop what is kept of a chat's words, in memory and on disk; of all words if `chat` is empty.

    What its running requests would leave behind is not kept either. Ends in `Finished`, or in
    `Failed` with what could not be removed.
    """

    id: str
    chat: str


Command = (
    GenerationRequest | Embed | Tokenize | Detokenize | Cancel | LoadModel | GetStatus | ForgetChat
)


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The first frame on a connection, from the engine."""

    protocol: int
    gryphon: str
    pid: int


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The prompt is tokenized and fits; `context_length` is None where a model has no limit."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    """Those of them whose states were kept from an earlier request."""
    context_length: int | None
    notice: str = ""
    """What a person should know about how this will run; empty as a rule."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """What a request is waiting for. `processed` of `total` are tokens in "prefill" and bytes in
    "load"; total 0 is unknown. In "queue" `total` is the number of requests ahead, told again when
    it changes; requests for a model that is not resident wait for running ones besides."""

    id: str
    phase: Literal["queue", "swap", "load", "prefill"]
    processed: int
    total: int
    detail: str = ""
    """One line for a person, for example which model is loading."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """One alternative at one position."""

    token_id: int
    text: str
    raw: bytes
    """The token's bytes: part of a character is not valid UTF-8 by itself."""
    logprob: float


class Token(msgspec.Struct, frozen=True, tag="token"):
    """One generated token. `text` is what became readable with it and may be empty: bytes wait
    until they form characters, and text that may begin a stop string waits until it does not.
    The same holds for `reasoning`, what the model thinks before it answers."""

    id: str
    text: str
    token_id: int
    logprob: TokenLogprob | None = None
    top: list[TokenLogprob] = []
    reasoning: str = ""


class ToolCall(msgspec.Struct, frozen=True, tag="tool_call"):
    """The model calls one of the tools it was given; sent once, when the call is whole."""

    id: str
    call_id: str
    """Made up by the engine, and unique."""
    name: str
    arguments: str
    """JSON text of an object. It need not fit the tool's schema: models err."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int = 0
    """Guessed by speculation."""
    accepted_tokens: int = 0
    """Those of them that are in the answer."""


class Timings(msgspec.Struct, frozen=True):
    """Where the time of one request went, in seconds."""

    queue_s: float
    prefill_s: float
    decode_s: float

    def decode_tps(self, usage: Usage) -> float:
        """Decoded tokens per second; the first token comes out of prefill."""
        tokens = max(0, usage.completion_tokens - 1)
        return tokens / self.decode_s if self.decode_s > 0 else 0.0

    def prefill_tps(self, usage: Usage) -> float:
        """Prompt tokens per second."""
        computed = usage.prompt_tokens - usage.cached_tokens
        return computed / self.prefill_s if self.prefill_s > 0 else 0.0


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The good end of a request. `text` and `reasoning` are what the last token released, often
    empty. The reason is "tool_calls" when the model ended by itself after calling a tool."""

    id: str
    reason: FinishReason
    usage: Usage
    timings: Timings
    text: str = ""
    reasoning: str = ""
    stop_string: str = ""
    """The one of the request's that ended the text; empty where something else ended it."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The bad end of a request: `message` is one sentence for a person and what to do."""

    id: str
    code: str
    message: str
    retry_after: float | None = None


Phase = Literal["preparing", "queued", "loading", "prefill", "decode"]


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One request under way. What it says is never part of it."""

    id: str
    client: str
    """Who asked: what the request says, else a name of the connection it came over."""
    model: str
    phase: Phase
    """"preparing" is rendering and tokenizing, "loading" its model."""
    prompt_tokens: int
    """0 until it is accepted, as are cached_tokens."""
    cached_tokens: int
    generated_tokens: int
    seconds: float
    """Since it arrived."""


class Histogram(msgspec.Struct, frozen=True):
    """How often a value was up to each of `bounds`, which ascend, and not up to the one before.
    `counts` has one more: how often it was above them all."""

    bounds: list[float]
    counts: list[int]
    sum: float


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has done since it started. Times are in seconds and seen by its clients'
    side of it, the MLX thread's delays included."""

    finished: dict[str, int]
    """Requests by finish reason."""
    failed: dict[str, int]
    """Requests by error code."""
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    model_loads: int
    queue_s: Histogram
    """From arrival to the beginning of prefill, of every accepted request."""
    first_token_s: Histogram
    """From arrival to the first token."""
    between_tokens_s: Histogram
    """From one token of an answer to the next."""
    request_s: Histogram
    """From arrival to the end, of those that finished."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True, tag="engine_status"):
    """A picture of the engine, for `gryphon ps`, status bars and /health."""

    id: str
    pid: int
    gryphon: str
    model: ModelRef | None
    state: ModelState
    device: str
    backend_note: str
    """How matrix products run, e.g. "OpenBLAS, float32"; says so when the path is a slow one, as
    where a Metal kernel failed its self-check."""
    weight_bytes: int
    state_bytes: int
    """Key/value and recurrent state of the running rows."""
    prefix_bytes: int = 0
    """The same of earlier prompts and answers, kept so that others continue from them."""
    scratch_bytes: int = 0
    """Set aside for computing the running rows' next tokens."""
    active_bytes: int
    """What MLX holds in all."""
    cache_bytes: int = 0
    """Freed buffers that MLX keeps for later, on top of that."""
    footprint_bytes: int = 0
    """Resident memory of the engine process: Python and its libraries too."""
    budget_bytes: int = 0
    """What weights, states, prefix cache and scratch may take together at present."""
    running: int
    queued: int
    uptime_s: float
    context_length: int | None = None
    keep_alive_left_s: float | None = None
    """Seconds until the model leaves memory if no request comes; None for never."""
    requests: list[RequestStatus] = []
    """Those under way, oldest first; loads of models too."""
    counters: Counters | None = None


Event = (
    Welcome
    | Accepted
    | Progress
    | Token
    | ToolCall
    | Embedded
    | Tokenized
    | Detokenized
    | Finished
    | Failed
    | EngineStatus
)

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode_frame(message: Command | Event) -> bytes:
    """One frame, ready to write.

    Raises:
        GryphonError: "request_too_large", over `MAX_FRAME_BYTES`, "invalid_text", or
            "invalid_request": nested too deeply, or a whole number of more than 64 bits.
    """
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise GryphonError(
            "invalid_text", "The text is not valid Unicode: it holds bytes that are not UTF-8."
        ) from error
    except RecursionError as error:
        raise GryphonError("invalid_request", "The request is nested too deeply.") from error
    except OverflowError as error:
        raise GryphonError(
            "invalid_request",
            "The request holds a whole number that does not fit into 64 bits, in the parameters of "
            "a tool or in template_options. Leave it out.",
        ) from error
    if len(body) > MAX_FRAME_BYTES:
        raise GryphonError(
            "request_too_large",
            f"The request takes {len(body)} bytes and the engine accepts {MAX_FRAME_BYTES}. "
            "Send less text.",
        )
    return struct.pack(">I", len(body)) + body


async def _read_body(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack(">I", await reader.readexactly(4))
    if size > MAX_FRAME_BYTES:
        raise ConnectionError(f"frame of {size} bytes is larger than {MAX_FRAME_BYTES}")
    return await reader.readexactly(size)


async def read_command(reader: asyncio.StreamReader) -> Command:
    """Next command; `asyncio.IncompleteReadError` at the end of the connection."""
    return _commands.decode(await _read_body(reader))


async def read_event(reader: asyncio.StreamReader) -> Event:
    """Next event; `asyncio.IncompleteReadError` at the end of the connection."""
    return _events.decode(await _read_body(reader))
