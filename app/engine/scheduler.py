"""Continuous batching on the one thread that owns MLX.

A request waits in a queue, is prefilled alone in chunks, then joins the batch that decodes one
token for all its rows at once. Between two decode steps at most one chunk of prefill runs, so no
running row waits longer than that for a newcomer; several short prompts may share it, one after the
other. The last prompt token is not prefilled: it is the row's first input to the batch, so every
forward pass but those of prefill serves all rows.

Decoding is one step ahead of reading: a step is launched with the tokens of the step before, still
unread, and only then are those read, turned into text and sent. A row that turns out to have ended
leaves the batch then; what the launched step computed for it is dropped.

States are kept for other requests (`app.engine.prefix_cache`): where the prompt's messages begin
and end, before its last token, and where the row ends, whatever ended it. A request continues from
the longest of them that its prompt begins with.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from app.engine import kernels
from app.engine.admission import PREFILL_CHUNK, admit
from app.engine.batch import Batch, Emit, Launch, Row
from app.engine.memory import available_bytes
from app.engine.prefix_cache import PrefixCache, can_keep
from app.engine.protocol import (
    Event,
    GenerationRequest,
    LoadModel,
    ModelRef,
    ModelState,
    Progress,
    Token,
    TokenLogprob,
)
from app.engine.resident import ResidentModel, load_resident, release_memory
from app.errors import GryphonError

logger = logging.getLogger(__name__)

MAX_ROWS = 16
MAX_QUEUE = 64
_MAX_PREFIX_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Snapshot:
    """What the engine looks like from outside, replaced whole so that any thread may read it."""

    model: ModelRef | None = None
    state: ModelState = "unloaded"
    weight_bytes: int = 0
    state_bytes: int = 0
    prefix_bytes: int = 0
    active_bytes: int = 0
    running: int = 0
    queued: int = 0
    context_length: int | None = None
    note: str = ""


class Scheduler:
    """Owns the model and the batch.

    `submit`, `cancel` and `stop` may be called from any thread; everything else happens in `run`,
    on the thread that calls it. Events go out through each row's own `emit`.

    Args:
        prefix_cache_bytes: Memory for states kept for later requests, 0 keeps none; None takes a
            tenth of what is available once a model is loaded, at most 2 GiB.
    """

    def __init__(self, prefix_cache_bytes: int | None = 0) -> None:
        self.snapshot = Snapshot()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._queue: deque[Row] = deque()
        self._prefilling: Row | None = None
        self._batch = Batch()
        self._in_flight: Launch | None = None
        self._resident: ResidentModel | None = None
        self._prefix_cache_bytes = prefix_cache_bytes
        self._prefixes: PrefixCache | None = None
        self._outbox: list[tuple[Emit, Event]] = []

    # Called from other threads.

    def submit(self, row: Row) -> None:
        """Queue a request; it ends in exactly one `Finished` or `Failed`."""
        self._inbox.put(lambda: self._enqueue(row))

    def cancel(self, row: Row) -> None:
        """End a request early, wherever it is. Nothing happens when it has ended."""
        self._inbox.put(lambda: self._cancel(row))

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._stopping.set()
        self._inbox.put(lambda: None)

    # The MLX thread.

    def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            idle = not (self._queue or self._holds_state)
            self._take_inbox(block=idle)
            self._admit()
            self._prefill()
            if self._batch.rows or self._in_flight is not None:
                in_flight = self._in_flight.rows if self._in_flight is not None else []
                self._guarded(self._decode, [*self._batch.rows, *in_flight])
            self._end_turn()

    @property
    def _active(self) -> int:
        """Rows being prefilled or decoded."""
        return len(self._batch.rows) + (self._prefilling is not None)

    @property
    def _holds_state(self) -> bool:
        return bool(self._active) or self._in_flight is not None

    def _take_inbox(self, *, block: bool) -> None:
        try:
            self._inbox.get(block=block)()
            while True:
                self._inbox.get(block=False)()
        except queue.Empty:
            pass

    def _guarded(self, work: Callable[[], None], rows: Iterable[Row]) -> None:
        """Run one piece of work; whatever it raises ends the rows it was for, and only those."""
        rows = list(rows)
        try:
            work()
        except Exception as error:
            logger.exception("an engine step failed")
            for row in rows:
                row.fail(
                    "engine_error",
                    f"The engine failed while answering ({type(error).__name__}: {error}). "
                    "Try again; `gryphon doctor` shows where its log is.",
                )
            if self._prefilling is not None and self._prefilling.done:
                self._prefilling = None
            if any(row.done for row in self._batch.rows):
                # The batch's states may be half advanced: none of its rows can go on from them.
                self._batch = Batch()
            if self._in_flight is not None and any(row.done for row in self._in_flight.rows):
                self._in_flight = None

    # Arrival and departure.

    def _enqueue(self, row: Row) -> None:
        request = row.request
        send = row.emit
        row.emit = lambda event: self._outbox.append((send, event))
        if len(self._queue) >= MAX_QUEUE:
            row.fail(
                "queue_full",
                f"{len(self._queue)} requests are waiting already. Try again in a moment.",
                retry_after=1.0,
            )
            return
        others = [waiting.request.model for waiting in self._queue]
        if self._resident is not None and self._holds_state:
            others.append(self._resident.ref)
        in_use = next((model for model in others if model != request.model), None)
        if (
            isinstance(request, GenerationRequest)
            and not request.wait_for_model
            and in_use is not None
        ):
            row.fail(
                "model_busy",
                f"{in_use.name} is in use, so {request.model.name} cannot be loaded now. "
                "Try again later, or let the request wait.",
                retry_after=1.0,
            )
            return
        if ahead := len(self._queue) + (self._prefilling is not None):
            row.emit(Progress(request.id, "queue", 0, ahead))
        self._queue.append(row)

    def _cancel(self, row: Row) -> None:
        if row.done:
            return
        row.finish("cancelled", row.text.finish() if row.text is not None else "")
        if row in self._queue:
            self._queue.remove(row)
        if row is self._prefilling:
            self._prefilling = None
            self._keep(row, row.caches)
        self._drop(lambda row: row.done)

    def _drop(self, ended: Callable[[Row], bool]) -> None:
        """Remove rows from the batch; what they have read and written may be continued."""
        if self._prefixes is not None:
            for index, row in enumerate(self._batch.rows):
                if ended(row):
                    self._keep(row, self._batch.states_of(index))
        self._batch.drop(ended)

    def _keep(self, row: Row, states: list[Any]) -> None:
        """Keep a row's states for other requests; a failure costs time, not answers."""
        if self._prefixes is None:
            return
        try:
            self._prefixes.insert(row.fed, states)
        except Exception:
            logger.exception("keeping states failed")
            self._prefixes.clear()

    # Admission: at most one model change or one new row per turn.

    def _admit(self) -> None:
        if not self._queue or self._prefilling is not None:
            return
        row = self._queue[0]
        if self._resident is None or row.request.model != self._resident.ref:
            if self._holds_state:
                self._announce_wait(row)
                return
            if not self._change_model(row):
                return
        if isinstance(row.request, LoadModel):
            self._queue.popleft()
            row.finish("stop")
        elif self._active < (MAX_ROWS if self._resident and self._resident.can_batch else 1):
            self._queue.popleft()
            self._guarded(lambda: self._begin(row), [row])

    def _announce_wait(self, row: Row) -> None:
        if not row.announced_wait and self._resident is not None:
            row.announced_wait = True
            detail = f"waiting for {self._resident.ref.name} to finish"
            row.emit(Progress(row.request.id, "swap", 0, self._active, detail))

    def _change_model(self, row: Row) -> bool:
        """Make the model of `row` resident, or fail everyone who waits for that model."""
        ref = row.request.model
        self._resident = None
        self._prefixes = None
        self._batch = Batch()
        release_memory()
        self.snapshot = Snapshot(model=ref, state="loading", queued=len(self._queue))

        def progress(done: int, total: int) -> None:
            row.emit(Progress(row.request.id, "load", done, total, f"loading {ref.name}"))
            self._send_events()  # the turn will not end for a while

        try:
            self._resident = load_resident(ref, progress)
        except GryphonError as error:
            release_memory()
            for waiting in [row for row in self._queue if row.request.model == ref]:
                self._queue.remove(waiting)
                waiting.fail(error.code, error.message)
            return False
        self._prefixes = self._new_prefix_cache(self._resident)
        return True

    def _new_prefix_cache(self, resident: ResidentModel) -> PrefixCache | None:
        """None where nothing may be kept."""
        # A rotary base that depends on a prompt's length makes every state depend on it too: what
        # a prefix left behind in one prompt is not what it leaves in a longer one.
        if getattr(resident.loaded.model, "rotates_by_length", False):
            return None
        budget = self._prefix_cache_bytes
        if budget is None:
            budget = min(available_bytes() // 10, _MAX_PREFIX_BYTES)
        if not budget or not can_keep(resident.loaded.make_cache()):
            return None
        return PrefixCache(budget)

    def _begin(self, row: Row) -> None:
        """Start a row's prefill."""
        assert self._resident is not None
        admit(row, self._resident, self._prefixes)
        if not row.done:
            self._prefilling = row

    # Prefill and decode.

    def _prefill(self) -> None:
        """One chunk of one prompt, and whole short ones in what is left of the chunk's tokens.

        A prompt is never divided for its neighbours' sake: it is computed as it would be alone.
        """
        room = PREFILL_CHUNK[mx.default_device().type]
        while (row := self._prefilling) is not None:
            before = row.processed
            self._guarded(self._prefill_chunk, [row])
            room -= row.processed - before
            self._admit()
            following = self._prefilling
            if following is None or len(following.prompt) - 1 - following.processed > room:
                return

    def _prefill_chunk(self) -> None:
        row, resident = self._prefilling, self._resident
        assert row is not None and resident is not None
        total = len(row.prompt) - 1
        size = room = PREFILL_CHUNK[mx.default_device().type]
        while room and row.processed < total:
            stop = min(row.processed + room, total, *list(row.marks)[:1])
            chunk = row.prompt[row.processed : stop]
            # Only the states are evaluated, so the logits of these positions are never computed.
            resident.loaded.model(mx.array([chunk], mx.int32), cache=row.caches)
            mx.eval([cache.state for cache in row.caches])
            room -= len(chunk)
            row.processed = stop
            if row.marks and stop == row.marks[0]:
                row.marks.popleft()
                self._keep(row, row.caches)
        if total - row.cached > size:
            row.emit(Progress(row.request.id, "prefill", row.processed + 1, total + 1))
        if row.processed >= total:
            self._prefilling = None
            resident.loaded.end_prompt(row.caches)
            self._batch.join(row)

    def _decode(self) -> None:
        # A row whose last allowed token is already being computed feeds nothing more.
        self._drop(lambda row: row.launched >= row.max_tokens)
        launch = None
        if self._batch.rows:
            assert self._resident is not None
            launch = self._batch.launch(self._resident.loaded.model)
        if self._in_flight is not None:
            self._read(self._in_flight)
        self._in_flight = launch
        self._drop(lambda row: row.done)

    def _read(self, launch: Launch) -> None:
        """Turn the tokens of a launched step into events."""
        tokens = launch.token_ids()
        now = time.monotonic()
        for index, row in enumerate(launch.rows):
            if not row.done:
                row.first_token_s = row.first_token_s or now
                self._deliver(row, tokens[index], launch, index)

    def _deliver(self, row: Row, token_id: int, launch: Launch, index: int) -> None:
        assert self._resident is not None and row.text is not None
        row.answer.append(token_id)
        if token_id in self._resident.loaded.eos_token_ids:
            row.finish("stop", row.text.finish())
            return
        row.generated += 1
        may_stop = row.generated >= row.generation.min_tokens
        text, stopped = row.text.add(token_id, may_stop=may_stop)
        logprob, top = None, []
        if row.generation.logprobs:
            value, alternatives = launch.logprobs_of(index, row.generation.top_logprobs)
            logprob = self._named(token_id, value)
            top = [self._named(*alternative) for alternative in alternatives]
        row.emit(Token(row.request.id, text, token_id, logprob, top))
        if stopped:
            row.finish("stop")
        elif row.generated >= row.max_tokens:
            row.finish("length", row.text.finish())

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        assert self._resident is not None
        raw = self._resident.loaded.tokenizer.token_bytes(token_id)
        return TokenLogprob(token_id, raw.decode("utf-8", "replace"), raw, logprob)

    def _end_turn(self) -> None:
        """Events go out after the snapshot that includes what they tell."""
        self._publish()
        self._send_events()

    def _send_events(self) -> None:
        for send, event in self._outbox:
            send(event)
        self._outbox.clear()

    def _publish(self) -> None:
        resident = self._resident
        if resident is None:
            self.snapshot = Snapshot(active_bytes=mx.get_active_memory(), queued=len(self._queue))
            return
        self.snapshot = Snapshot(
            model=resident.ref,
            state="ready",
            weight_bytes=resident.loaded.nbytes,
            state_bytes=self._batch.nbytes,
            prefix_bytes=self._prefixes.nbytes if self._prefixes is not None else 0,
            active_bytes=mx.get_active_memory(),
            running=self._active,
            queued=len(self._queue),
            context_length=resident.loaded.context_length,
            note=", ".join([resident.note, *kernels.faults()]),
        )
