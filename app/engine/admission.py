"""From a waiting request to a row ready for its prefill: checks against the resident model."""

from __future__ import annotations

import time
from collections import deque

import mlx.core as mx

from app.engine.answer import AnswerStream
from app.engine.answer_parts import PLAIN
from app.engine.batch import Row
from app.engine.prefix_cache import PrefixCache
from app.engine.protocol import Accepted
from app.engine.resident import ResidentModel
from app.engine.room import Room
from app.engine.sampling import NEVER, RowGenerator, RowSampling
from app.engine.speculation import check_speculation
from app.engine.state_leaves import always_trimmable
from app.errors import GryphonError

# A model without a context limit could answer for ever: an answer then ends here by default.
DEFAULT_MAX_TOKENS = 8192
# Tokens prefilled between two decode steps: a fraction of a second on either kind of device.
PREFILL_CHUNK = {mx.DeviceType.gpu: 512, mx.DeviceType.cpu: 192}
# Chunks of a long prompt between two of its states kept, where states cannot be trimmed.
_CHUNKS_PER_MARK = 4


def admit(
    row: Row,
    resident: ResidentModel,
    prefixes: PrefixCache | None,
    room: Room,
    *,
    others_wait: bool,
) -> None:
    """Make a row ready for its prefill and tell who asked, or fail it with what is wrong."""
    try:
        check_prompt(row, resident)
        row.max_tokens, notice = _most_tokens(row, resident, room)
        _check_sampling(row, resident)
        check_speculation(row, resident)
    except GryphonError as error:
        row.fail(error.code, error.message)
        return
    loaded, request = resident.loaded, row.generation
    # A constraint is on the whole answer, and a gap begins with its own space, if with any: none of
    # either is anything but text.
    exact = request.constraint is not None or request.fills_gap
    row.text = AnswerStream(
        loaded.tokenizer,
        request.stop,
        PLAIN if exact else row.format,
        request.tools,
        exact=exact,
        only_calls=row.must_call,
    )
    row.sampling = RowSampling.of(
        request.sampling,
        resident.recommended,
        # A model may declare ends that it lacks.
        eos_token_ids=[
            id for id in loaded.eos_token_ids | row.ends if 0 <= id < resident.vocab_size
        ],
        # As in text-generation-webui: a byte or sentencepiece prefix is no newline.
        newline_ids=loaded.tokenizer.encode("\n", add_special_tokens=False)[-1:],
        min_tokens=NEVER if request.ignore_eos else request.min_tokens,
    )
    row.generator = RowGenerator(request.sampling.seed)
    found = None
    if prefixes is not None:
        found = prefixes.find(row.prompt, request.chat, is_urgent=others_wait)
    row.cached, row.caches = found or (0, loaded.make_cache())
    row.processed = row.cached
    row.marks = _marks(row) if prefixes is not None else deque()
    loaded.begin_prompt(row.caches, len(row.prompt))
    row.admitted_s = time.monotonic()
    context = least_of(loaded.context_length, room.context)
    notice = " ".join(filter(None, [row.notice, notice]))
    row.emit(Accepted(request.id, len(row.prompt), row.cached, context, notice))


def check_prompt(row: Row, resident: ResidentModel) -> None:
    """Refuse a prompt that the model cannot read, or inputs that it cannot embed.

    Raises:
        GryphonError: "context_length_exceeded", "invalid_request"; as `Embedding.check`.
    """
    if row.embedding is not None:
        row.embedding.check(resident)
        return
    name, limit = resident.ref.name, resident.loaded.context_length
    if limit is not None and len(row.prompt) >= limit:
        raise GryphonError(
            "context_length_exceeded",
            f"The prompt has {len(row.prompt)} tokens and {name} has room for {limit} in "
            "prompt and answer together. Shorten the prompt or start a new chat.",
        )
    if not 0 <= min(row.prompt) <= max(row.prompt) < resident.vocab_size:
        raise GryphonError(
            "invalid_request",
            f"Prompt tokens must be 0 to {resident.vocab_size - 1} for {name}, "
            f"got {min(row.prompt)} to {max(row.prompt)}.",
        )


def least_of(*limits: int | None) -> int | None:
    """The lowest of some limits; None where there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def _most_tokens(row: Row, resident: ResidentModel, room: Room) -> tuple[int, str]:
    """How many tokens the answer may have, and what to say if memory is why not more."""
    limit, asked = resident.loaded.context_length, row.generation.max_tokens
    most = asked or DEFAULT_MAX_TOKENS
    if limit is not None:
        left = limit - len(row.prompt)
        most = min(asked or left, left)
    if room.context is None or most <= room.context - len(row.prompt):
        return most, ""
    notice = f"There is memory for {room.context} tokens of prompt and answer together."
    return room.context - len(row.prompt), notice


def _check_sampling(row: Row, resident: ResidentModel) -> None:
    name, vocab_size = resident.ref.name, resident.vocab_size
    request = row.generation
    outside = [id for id in request.sampling.logit_bias or {} if id >= vocab_size]
    if outside:
        raise GryphonError(
            "invalid_sampling",
            f"logit_bias must be for token ids of 0 to {vocab_size - 1} for {name}, "
            f"got {outside[0]}.",
        )
    if request.min_tokens > row.max_tokens:
        raise GryphonError(
            "invalid_sampling",
            f"min_tokens is {request.min_tokens}, but an answer to this prompt of "
            f"{len(row.prompt)} tokens may have {row.max_tokens} at most. Lower min_tokens, "
            "shorten the prompt, or give max_tokens if the model has no context limit.",
        )


def _marks(row: Row) -> deque[int]:
    """Where in a prompt to keep its states: before its last token, for asking again, where an edit
    or the next turn will part from it, and now and then on the way there.

    Nowhere if states can be trimmed: what is kept at the row's end serves all of that, and who asks
    before gets it from the running row (`Scheduler._share`). They are large, and the first token
    would wait for their copy.
    """
    if always_trimmable(row.caches) and row.generation.speculation is None:
        return deque()
    end = len(row.prompt) - 1
    step = _CHUNKS_PER_MARK * PREFILL_CHUNK[mx.default_device().type]
    marks = {end}
    if not always_trimmable(row.caches):
        marks |= {*row.boundaries, *range(row.cached + step, end, step)}
    return deque(sorted(mark for mark in marks if row.cached < mark <= end))
