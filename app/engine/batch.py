"""Rows that decode together: their states, the tokens they feed, one step of them all."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from app.engine.answer import NOTHING, AnswerStream, Released, new_call_id
from app.engine.answer_parts import PLAIN, AnswerFormat
from app.engine.conversation import MAX_JSON_DEPTH
from app.engine.matcher import Matcher
from app.engine.penalties import Penalties
from app.engine.protocol import (
    DraftModel,
    Embed,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    LoadModel,
    PromptLookup,
    Timings,
    ToolCall,
    Usage,
)
from app.engine.sampling import (
    BatchSampling,
    RowGenerator,
    RowSampling,
    logprobs_of,
    sample,
    top_logprobs,
)

if TYPE_CHECKING:
    from app.engine.embedding import Embedding
    from app.engine.speculation import Lane

Emit = Callable[[Event], None]
_NO_CALL = (
    "The model made the call that tool_choice asks for, but with arguments that cannot be read: "
    f"nested deeper than {MAX_JSON_DEPTH} levels, a number like 1e999, or too long. Bound them in "
    "the tool's parameters, or use auto."
)


@dataclass(eq=False)
class Row:
    """One request on its way through the engine."""

    request: GenerationRequest | Embed | LoadModel
    emit: Emit
    """Sends an event to whoever asked; called on the MLX thread."""
    prompt: list[int] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)
    """Lengths of prefixes of the prompt that other prompts are likely to begin with."""
    format: AnswerFormat = PLAIN
    notice: str = ""
    """What a person should know of the prompt."""
    matcher: Matcher | None = None
    """Where its answer is in the constraint it was given, or in the call it must make."""
    connection: str = ""
    """Over which it came."""
    embedding: Embedding | None = None
    """What it is to embed; the longest of that is its prompt then."""
    ends: frozenset[int] = frozenset()
    """Tokens that end its answer besides the model's own ends."""
    done: bool = False
    announced_wait: bool = False
    is_forgotten: bool = False
    """Nothing of it may be kept for other requests any more."""
    waits_for_memory_s: float = 0.0
    """Since when; 0 if it does not."""

    # Set at admission.
    caches: list[Any] = field(default_factory=list)
    cached: int = 0
    """Prompt tokens whose states were computed for an earlier request."""
    marks: deque[int] = field(default_factory=deque)
    """Where its prefill stops to have its states kept, ascending."""
    processed: int = 0
    """Prompt tokens that the states have read before the row joins the batch."""
    max_tokens: int = 0
    launched: int = 0
    """Tokens whose computation has been started."""
    answer: list[int] = field(default_factory=list)
    """Tokens read, the one that ended it included."""
    generated: int = 0
    """Tokens read and sent."""
    text: AnswerStream | None = None
    sampling: RowSampling | None = None
    generator: RowGenerator | None = None
    lane: Lane | None = None
    """Where it decodes by itself while it speculates."""
    drafted: int = 0
    accepted: int = 0

    submitted_s: float = field(default_factory=time.monotonic)
    admitted_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def generation(self) -> GenerationRequest:
        assert isinstance(self.request, GenerationRequest)
        return self.request

    @property
    def must_call(self) -> bool:
        """Whether its answer is held to be a call, as tool_choice says."""
        return self.matcher is not None and self.generation.constraint is None

    @property
    def client(self) -> str:
        """For whom it takes its turn."""
        named = "" if isinstance(self.request, LoadModel) else self.request.client
        return named or self.connection

    @property
    def uses_draft(self) -> bool:
        """Whether it asks for a draft model."""
        return isinstance(self.speculation, DraftModel)

    @property
    def speculation(self) -> PromptLookup | DraftModel | None:
        """How its next tokens are to be guessed."""
        is_generation = isinstance(self.request, GenerationRequest)
        return self.generation.speculation if is_generation else None

    @property
    def usage(self) -> Usage:
        if self.embedding is not None:
            return Usage(self.embedding.total, 0, 0)
        return Usage(len(self.prompt), self.generated, self.cached, self.drafted, self.accepted)

    @property
    def fed(self) -> list[int]:
        """The tokens that its states have read; between two steps all of them are known."""
        return (self.prompt + self.answer)[: self.processed + self.launched]

    def timings(self) -> Timings:
        now = time.monotonic()
        admitted = self.admitted_s or now
        first = self.first_token_s or now
        return Timings(
            queue_s=admitted - self.submitted_s,
            prefill_s=first - admitted,
            decode_s=now - first,
        )

    def send_calls(self, released: Released) -> None:
        """Send what the model called."""
        for call in released.calls:
            self.emit(ToolCall(self.request.id, new_call_id(), call.name, call.arguments))

    def finish(self, reason: FinishReason, rest: Released = NOTHING) -> None:
        """Send the rest of the answer and the one `Finished` of this row; or `Failed`, where the
        answer was to be a call and none can be read."""
        is_call = self.text is not None and self.text.calls > 0
        if reason == "stop" and self.must_call and not is_call:
            self.fail("constraint_failed", _NO_CALL)
        if not self._ends():
            return
        self.send_calls(rest)
        if reason == "stop" and is_call:
            reason = "tool_calls"
        usage, timings = self.usage, self.timings()
        stop_string = self.text.stop_string if self.text is not None else ""
        self.emit(
            Finished(
                self.request.id, reason, usage, timings, rest.text, rest.reasoning, stop_string
            )
        )

    def fail(self, code: str, message: str, retry_after: float | None = None) -> None:
        """Send the one `Failed` of this row."""
        if self._ends():
            self.emit(Failed(self.request.id, code, message, retry_after))

    def _ends(self) -> bool:
        """Whether it had not ended before; it has now."""
        if self.done:
            return False
        self.done = True
        if self.matcher is not None:
            self.matcher.close()
        return True


@dataclass
class Launch:
    """A decode step of B rows whose results have not been read.

    Attributes:
        rows: The B rows, in the order of the arrays.
        tokens: [B] int32.
        is_nan: [B] bool, whether some of the logits they were drawn from were no numbers.
        logprobs: [B] float32, of those tokens; None when no row asked.
        top_ids, top_values: [B, n], the n most likely tokens, most likely first; None as above.
    """

    rows: list[Row]
    tokens: mx.array
    is_nan: mx.array
    logprobs: mx.array | None = None
    top_ids: mx.array | None = None
    top_values: mx.array | None = None

    @classmethod
    def of(cls, rows: list[Row], logits: mx.array, tokens: mx.array) -> Launch:
        """A step that is yet to be started: what the rows draw from logits [B, V] of the model."""
        # As float32: a sum of many float16 numbers may exceed them and be none itself.
        launch = cls(rows, tokens, mx.isnan(logits.astype(mx.float32).sum(axis=-1)))
        requests = [row.generation for row in rows]
        if any(request.logprobs for request in requests):
            logprobs = logprobs_of(logits)
            chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)
            launch.logprobs = chosen[:, 0]
            if count := max(request.top_logprobs for request in requests):
                launch.top_ids, launch.top_values = top_logprobs(logprobs, count)
        return launch

    def start(self) -> None:
        """Begin to compute it, without waiting for it."""
        given = [self.tokens, self.is_nan, self.logprobs, self.top_ids, self.top_values]
        mx.async_eval([array for array in given if array is not None])

    # What is read is read whole: to index an array is a computation of its own, which would wait
    # for the step that was launched meanwhile.

    def token_ids(self) -> list[int]:
        """The tokens of all rows; waits for them."""
        return cast(list[int], self.tokens.tolist())

    def was_broken(self, index: int) -> bool:
        """Whether a row's token was drawn from what is no number, and so means nothing."""
        return self._broken[index]

    @functools.cached_property
    def _broken(self) -> list[bool]:
        return cast(list[bool], self.is_nan.tolist())

    @functools.cached_property
    def _values(self) -> list[float]:
        return [] if self.logprobs is None else cast(list[float], self.logprobs.tolist())

    @functools.cached_property
    def _top(self) -> list[list[tuple[int, float]]]:
        """The most likely tokens of each row, with their logprobs."""
        if self.top_ids is None or self.top_values is None:
            return [[] for _ in self.rows]
        ids = cast(list[list[int]], self.top_ids.tolist())
        values = cast(list[list[float]], self.top_values.tolist())
        return [list(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]

    def logprobs_of(self, index: int, count: int) -> tuple[float, list[tuple[int, float]]]:
        """Logprob of a row's token, and of the `count` most likely ones with their ids."""
        return self._values[index], self._top[index][:count]


class Batch:
    """The rows being decoded, their layer states, and the token each feeds next.

    One row keeps the plain per-layer states that its prefill made; more are merged by the states'
    own protocol (`merge`, `extend`, `filter`, `extract`).
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.caches: list[Any] = []
        self.inputs = mx.zeros((0,), mx.int32)
        """[B] int32."""
        self._settings: BatchSampling | None = None  # None: rows have joined or left
        self._penalties = Penalties()

    def join(self, row: Row) -> None:
        """Add a row whose states have read all it has but its last token, which it feeds first."""
        if not self.rows:
            self.caches = row.caches
        elif len(self.rows) == 1:
            pairs = zip(self.caches, row.caches, strict=True)
            self.caches = [type(old).merge([old, new]) for old, new in pairs]
        else:
            for batched, new in zip(self.caches, row.caches, strict=True):
                batched.extend(type(new).merge([new]))
        row.caches = []
        self.rows.append(row)
        token = mx.array((row.answer or row.prompt)[-1:], mx.int32)
        self.inputs = mx.concatenate([self.inputs, token])
        self._settings = None

    def states_of(self, index: int) -> list[Any]:
        """Layer states of one row; of the only row, those that the next step changes."""
        if len(self.rows) == 1:
            return self.caches
        return [cache.extract(index) for cache in self.caches]

    def drop(self, ended: Callable[[Row], bool]) -> None:
        """Remove the rows for which `ended` holds, and their states."""
        keep = [i for i, row in enumerate(self.rows) if not ended(row)]
        if len(keep) == len(self.rows):
            return
        if not keep:
            self.caches = []
            self._penalties = Penalties()
        elif len(keep) == 1:
            self.caches = [cache.extract(keep[0]) for cache in self.caches]
        else:
            for cache in self.caches:
                cache.filter(keep)
        self.rows = [self.rows[i] for i in keep]
        self.inputs = self.inputs[mx.array(keep, mx.int32)] if keep else self.inputs[:0]
        self._settings = None

    @property
    def is_constrained(self) -> bool:
        """Whether some row must know its last token before it can draw the next."""
        return any(row.matcher is not None for row in self.rows)

    def forward(self, model: nn.Module) -> mx.array:
        """Every row feeds its token: logits of the next, [B, V], yet to be computed."""
        return cast(mx.array, model(self.inputs[:, None], cache=self.caches)[:, -1])

    def draw(self, logits: mx.array, allowed: NDArray[np.bool_] | None = None) -> Launch:
        """Every row draws its next token; the step is yet to be started.

        Args:
            logits: [B, V], of `forward`.
            allowed: [B, V], which tokens constraints leave each row; None is all to all.
        """
        if self._settings is None:
            self._settings = BatchSampling.of([row.sampling for row in self.rows if row.sampling])
            self._penalties.follow(self.rows, logits.shape[-1])
        uniforms, exclude_top = [], []
        for row in self.rows:
            assert row.generator is not None and row.sampling is not None
            uniforms.append(row.generator.uniform())
            chance = row.sampling.xtc_probability
            exclude_top.append(chance > 0 and row.generator.coin(chance))
        choices = logits if allowed is None else mx.where(mx.array(allowed), logits, -mx.inf)
        tokens = sample(self._penalties.apply(choices), self._settings, uniforms, exclude_top)
        self._penalties.count(tokens)
        launch = Launch.of(list(self.rows), logits, tokens)
        self.inputs = launch.tokens
        for row in self.rows:
            row.launched += 1
        return launch

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' states."""
        return sum(int(cache.nbytes) for cache in self.caches) + self._penalties.nbytes
