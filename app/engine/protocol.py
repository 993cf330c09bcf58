"""What crosses the boundary between a face and the engine process.

One frame is a 4-byte big-endian length and that many bytes of MessagePack: a tagged `Command`
towards the engine, a tagged `Event` from it. One connection carries any number of requests, told
apart by an `id` of at most `MAX_REQUEST_ID` characters that the client chooses. Every request ends
in exactly one `Finished` or `Failed`.
No MLX here, nor anything that imports it.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from app.engine.constraint import Constraint, check_constraint
from app.engine.conversation import Message as Message
from app.engine.conversation import Tool as Tool
from app.engine.conversation import ToolCallPart as ToolCallPart
from app.engine.conversation import check_messages, check_options, check_tools
from app.errors import GryphonError

PROTOCOL_VERSION = 3
MAX_FRAME_BYTES = 64 * 1024 * 1024

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
ModelState = Literal["unloaded", "loading", "ready"]


class ModelRef(msgspec.Struct, frozen=True):
    """An installed model: the name people use and the directory that the library resolved it to."""

    name: str
    path: str
    adapter: str = ""
    """The directory of a LoRA adapter made by mlx-lm to put on the model; empty is none."""


class PromptLookup(msgspec.Struct, frozen=True, tag="prompt_lookup"):
    """Draft what followed the last tokens where they came before, in the prompt or the answer."""

    ngram: int = 3
    """How many tokens must be the same; where there is no such place, fewer, down to two. 1 to
    `MAX_LOOKUP_NGRAM`."""
    tokens: int = 7
    """Most tokens drafted at once, 1 to `MAX_DRAFT_TOKENS`."""


class DraftModel(msgspec.Struct, frozen=True, tag="draft_model"):
    """Draft with a smaller model of the same vocabulary, held in memory beside the other."""

    model: ModelRef
    tokens: int = 4
    """Most tokens drafted at once, 1 to `MAX_DRAFT_TOKENS`."""


MAX_LOOKUP_NGRAM = 16
MAX_DRAFT_TOKENS = 16


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen.

    In this order: a constraint, which leaves what it allows; logit_bias; repetition_penalty;
    presence_penalty and frequency_penalty; the ends of sequence that min_tokens and ignore_eos
    forbid; temperature; top_k; typical_p; top_p; min_p; XTC; then one token is drawn from what is
    left. Each filter sees what those before it left, made a distribution again; of equally likely
    tokens top_k and top_p take those of lower id first. This is llama.cpp's order, but temperature
    comes before the filters, as in transformers and vLLM, for which the settings that models
    recommend are chosen.

    None leaves a setting to the model's own generation_config.json, and where that says nothing to
    `HOUSE_SAMPLING`. Settings out of range are refused by `check_request`. Logprobs are those of
    the model, before all of this.
    """

    temperature: float | None = None
    """At most 2. 0 takes the most likely token, after bias and penalties: all the probability is
    on it then, so that no filter changes anything."""
    top_p: float | None = None
    """Smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: int | None = None
    """Most likely tokens kept; 0 is off."""
    min_p: float | None = None
    """Drops tokens below this fraction of the most likely one's probability; 0 is off."""
    typical_p: float | None = None
    """Keeps the tokens whose surprise, -log p, is closest to the expected one, up to this much
    probability; 1 is off. Source: Locally Typical Sampling, arXiv:2202.00666."""
    xtc_probability: float | None = None
    """How often the top choices are excluded, so that answers are less predictable; 0 is off.
    Source: text-generation-webui, pull request 6335."""
    xtc_threshold: float | None = None
    """Of the tokens with at least this probability, XTC leaves only the least likely (all that are
    equally so). 0 to 0.5: above it there are never two. A step in which that would take the end of
    the answer or a newline away is left as it is."""
    repetition_penalty: float | None = None
    """Divides positive logits and multiplies negative ones of the tokens in the prompt and in the
    answer so far; 0.1 to 10, 1 is off. Source: CTRL, arXiv:1909.05858, as in transformers."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens in the answer so far; -2 to 2. Source: OpenAI's API."""
    frequency_penalty: float | None = None
    """As presence_penalty, once for each time a token is in the answer so far."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids: -100 to 100, at most `MAX_LOGIT_BIAS` of them."""
    seed: int | None = None
    """Same seed, prompt and model: same tokens, alone or in a batch. None draws one. Where the
    prompt goes on from states that were kept, those may differ in their last bits from states
    computed anew, because the prompt was read in other pieces: enough to decide between two tokens
    that are equally likely up to rounding."""


HOUSE_SAMPLING = Sampling(
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    typical_p=1.0,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Ask for text. Exactly one of `messages`, `prompt` and `prompt_tokens` is set."""

    id: str
    model: ModelRef
    messages: list[Message] | None = None
    """Rendered with the model's own chat template."""
    prompt: str | None = None
    """Raw text, given to the model as it is (its BOS token is added, no template)."""
    prompt_tokens: list[int] | None = None
    """Token ids, used as they are."""
    tools: list[Tool] = []
    """What the model may call. Its template must know of tools; it is refused otherwise."""
    tool_choice: str = "auto"
    """"auto" lets the model choose, "none" answers as if there were no tools, "required" makes it
    call one, a tool's name makes it call that one. Made to, it makes exactly one call, after
    reasoning if it is a model that reasons, and says nothing else; the arguments are valid by the
    tool's schema, every keyword of which is enforced or the request refused. max_tokens cuts it
    short as ever: the reason is then "length", and half a call does not come out."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template, for example {"enable_thinking": false}."""
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    """None: what is left of the context."""
    min_tokens: int = 0
    """The answer does not end before it has this many tokens: no end-of-sequence token is drawn,
    and a stop string that is complete before is text like any other."""
    ignore_eos: bool = False
    """No end-of-sequence token is ever drawn; stop strings still end the answer."""
    stop: list[str] = []
    """Generation ends before the first of these strings; none of it reaches the text. They are
    looked for in the text alone: one in a tool call or in reasoning ends nothing."""
    logprobs: bool = False
    top_logprobs: int = 0
    """Alternatives reported per token with their logprobs, 0 to 20."""
    speculation: PromptLookup | DraftModel | None = None
    """Guess tokens and have the model check several in one pass. The answer is the same; `Usage`
    says how many guesses were right. A row whose guesses are not ends up without it."""
    constraint: Constraint | None = None
    """What the answer is forced to be; `Constraint` says how that goes with the other fields."""
    client: str = ""
    """Who asks, for fairness: requests of one client wait for each other first, and one client's
    many do not delay another's one. A face names itself ("tui") or, where it speaks for several,
    each of them (a digest of the API key, a remote address): all requests of a REST endpoint come
    over one connection. Empty: the connection. Shown by `gryphon ps`, so no secret."""
    wait_for_model: bool = True
    """False: fail with `model_busy` instead of waiting to swap out a model that is in use."""
    chat: str = ""
    """The chat that the words belong to, an id of the client's choice: what the engine keeps of
    them goes with `ForgetChat`. Empty: what is kept goes by age and size alone."""
    keep_alive_s: float | None = None
    """Seconds the model stays in memory after this request, if no other follows: 0 unloads it at
    once, a negative number or infinity never. None: as GRYPHON_KEEP_ALIVE says."""


MAX_REQUEST_ID = 200
MAX_MODEL_NAME = 1000
MAX_PATH = 4096
MAX_STOP_STRINGS = 16
# Text is compared with their beginnings at every token.
MAX_STOP_CHARACTERS = 1024
MAX_CLIENT_CHARACTERS = 200
MAX_CHAT_ID = 200
# OpenAI documents no limit; this is more than clients send and cheap to add at every step.
MAX_LOGIT_BIAS = 1024
_MAX_INT32 = 2**31 - 1
MAX_TOP_LOGPROBS = 20


def check_request(request: GenerationRequest) -> None:
    """Refuse what no model could answer.

    Raises:
        GryphonError: "invalid_request", "invalid_sampling" or "invalid_constraint", naming the
            field, what it may be and what it is.
    """
    given = [request.messages, request.prompt, request.prompt_tokens]
    if sum(part is not None for part in given) != 1:
        raise GryphonError(
            "invalid_request", "Give exactly one of messages, prompt and prompt_tokens."
        )
    if request.messages is not None and not request.messages:
        raise GryphonError("invalid_request", "messages is empty: give at least one message.")
    if request.prompt_tokens is not None and not request.prompt_tokens:
        raise GryphonError("invalid_request", "prompt_tokens is empty: give at least one token.")
    if request.messages is None and (request.tools or request.template_options):
        raise GryphonError(
            "invalid_request",
            "tools and template_options are for the chat template: give messages, not a prompt.",
        )
    check_model(request.model)
    check_messages(request.messages or [])
    check_tools(request.tools, request.tool_choice)
    check_options(request.template_options)
    if request.max_tokens is not None and not 1 <= request.max_tokens <= _MAX_INT32:
        raise GryphonError(
            "invalid_request",
            f"max_tokens must be 1 to {_MAX_INT32}, got {request.max_tokens}.",
        )
    most = _MAX_INT32 if request.max_tokens is None else request.max_tokens
    if not 0 <= request.min_tokens <= most:
        raise GryphonError(
            "invalid_request",
            f"min_tokens must be 0 to {most}"
            f"{'' if request.max_tokens is None else ', which is max_tokens'}, "
            f"got {request.min_tokens}.",
        )
    if len(request.stop) > MAX_STOP_STRINGS:
        raise GryphonError(
            "invalid_request",
            f"stop may hold {MAX_STOP_STRINGS} strings at most, got {len(request.stop)}.",
        )
    if "" in request.stop:
        raise GryphonError("invalid_request", "stop holds an empty string, which ends everything.")
    if (longest := max(map(len, request.stop), default=0)) > MAX_STOP_CHARACTERS:
        raise GryphonError(
            "invalid_request",
            f"A stop string may have {MAX_STOP_CHARACTERS} characters at most, got {longest}.",
        )
    if len(request.client) > MAX_CLIENT_CHARACTERS:
        raise GryphonError(
            "invalid_request",
            f"client may have {MAX_CLIENT_CHARACTERS} characters at most, "
            f"got {len(request.client)}.",
        )
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise GryphonError(
            "invalid_request",
            f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}, got {request.top_logprobs}.",
        )
    if request.constraint is not None:
        check_constraint(request.constraint)
    check_chat(request.chat)
    check_keep_alive(request)
    check_sampling(request.sampling)
    _check_speculation(request.speculation)
    _check_alone(request)


def _check_alone(request: GenerationRequest) -> None:
    """A constraint holds the whole answer to its form, one token at a time; so does tool_choice."""
    tools = request.tools if request.tool_choice != "none" else []
    if request.tool_choice not in ("auto", "none") and request.speculation:
        raise GryphonError(
            "invalid_request",
            f"tool_choice {request.tool_choice!r} and speculation cannot be combined: leave one of "
            "them out.",
        )
    for name, other in (("speculation", request.speculation), ("tools", tools)):
        if request.constraint is not None and other:
            raise GryphonError(
                "invalid_request",
                f"constraint and {name} cannot be combined: leave one of them out.",
            )


def _check_speculation(speculation: PromptLookup | DraftModel | None) -> None:
    if speculation is None:
        return
    if isinstance(speculation, DraftModel):
        check_model(speculation.model)
    bounds = {"tokens": (speculation.tokens, MAX_DRAFT_TOKENS)}
    if isinstance(speculation, PromptLookup):
        bounds["ngram"] = (speculation.ngram, MAX_LOOKUP_NGRAM)
    for name, (value, most) in bounds.items():
        if not 1 <= value <= most:
            raise GryphonError(
                "invalid_request", f"speculation.{name} must be 1 to {most}, got {value}."
            )


def check_model(model: ModelRef) -> None:
    """Refuse what names no model.

    Raises:
        GryphonError: "invalid_request".
    """
    if len(model.name) > MAX_MODEL_NAME:
        raise GryphonError(
            "invalid_request",
            f"A model's name may have {MAX_MODEL_NAME} characters at most, got {len(model.name)}.",
        )
    for path in (model.path, model.adapter):
        if len(path) > MAX_PATH or "\0" in path:
            raise GryphonError(
                "invalid_request",
                f"A model's directory must be a path of {MAX_PATH} characters at most, without "
                "zero bytes.",
            )


def check_chat(chat: str) -> None:
    """Refuse the id of a chat that is no id.

    Raises:
        GryphonError: "invalid_request".
    """
    if len(chat) > MAX_CHAT_ID:
        raise GryphonError(
            "invalid_request",
            f"chat may have {MAX_CHAT_ID} characters at most, got {len(chat)}.",
        )


_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
    "repetition_penalty": (0.1, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings out of range.

    Raises:
        GryphonError: "invalid_sampling", naming the field, its range and what it is.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise GryphonError(
                "invalid_sampling", f"{name} must be {low:g} to {high:g}, got {value:g}."
            )
    if sampling.top_k is not None and not 0 <= sampling.top_k <= _MAX_INT32:
        raise GryphonError(
            "invalid_sampling", f"top_k must be 0 (off) to {_MAX_INT32}, got {sampling.top_k}."
        )
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise GryphonError(
            "invalid_sampling", f"seed must be a 64-bit whole number, got {sampling.seed}."
        )
    _check_logit_bias(sampling.logit_bias or {})


def _check_logit_bias(bias: Mapping[int, float]) -> None:
    if len(bias) > MAX_LOGIT_BIAS:
        raise GryphonError(
            "invalid_sampling",
            f"logit_bias may hold {MAX_LOGIT_BIAS} tokens at most, got {len(bias)}.",
        )
    for token_id, value in bias.items():
        if not 0 <= token_id <= _MAX_INT32:
            raise GryphonError(
                "invalid_sampling",
                f"logit_bias must be for token ids of 0 to {_MAX_INT32}, got {token_id}.",
            )
        if not -100.0 <= value <= 100.0:
            raise GryphonError(
                "invalid_sampling",
                f"logit_bias of token {token_id} must be -100 to 100, got {value:g}.",
            )


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


def check_keep_alive(request: GenerationRequest | LoadModel) -> None:
    """Refuse what is no time.

    Raises:
        GryphonError: "invalid_request".
    """
    if request.keep_alive_s is not None and math.isnan(request.keep_alive_s):
        raise GryphonError("invalid_request", "keep_alive_s must be a number of seconds, got nan.")


class ForgetChat(msgspec.Struct, frozen=True, tag="forget"):
    """Drop what is kept of a chat's words, in memory and on disk; of all words if `chat` is empty.

    What its running requests would leave behind is not kept either. Ends in `Finished`, or in
    `Failed` with what could not be removed.
    """

    id: str
    chat: str


Command = GenerationRequest | Cancel | LoadModel | GetStatus | ForgetChat


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
    requests: list[RequestStatus] = []
    """Those under way, oldest first; loads of models too."""
    counters: Counters | None = None


Event = Welcome | Accepted | Progress | Token | ToolCall | Finished | Failed | EngineStatus

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode_frame(message: Command | Event) -> bytes:
    """One frame, ready to write.

    Raises:
        GryphonError: "request_too_large", over `MAX_FRAME_BYTES`, or "invalid_text".
    """
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise GryphonError(
            "invalid_text", "The text is not valid Unicode: it holds bytes that are not UTF-8."
        ) from error
    except RecursionError as error:
        raise GryphonError("invalid_request", "The request is nested too deeply.") from error
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
