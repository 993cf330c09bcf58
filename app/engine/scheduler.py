"""Continuous batching on the one thread that owns MLX.

A request waits in a queue (`app.engine.waiting`), is prefilled alone in chunks, then joins the
batch that decodes one token for all its rows at once. Between two decode steps at most one chunk of
prefill runs, so no running row waits longer than that for a newcomer; several short prompts may
share it, one after the other. The last prompt token is not prefilled: it is the row's first input
to the batch, so every forward pass but those of prefill serves all rows.

On a GPU decoding is one step ahead of reading: a step is launched with the tokens of the step
before, still unread, and only then are those read, turned into text and sent. A row that turns out
to have ended leaves the batch then; what the launched step computed for it is dropped. A row with a
constraint needs its last token to know what may come next: where there is one, the forward pass is
launched, the step before is read while it runs, and only then is the next token drawn. On a CPU
MLX returns from a launch when the step is nearly done, and each token would come a step late: there
the next step is put together while the one before it ends, which is read before it is launched.

A row that speculates decodes in a lane of its own (`app.engine.speculation`); one lane runs after
each step of the batch. What is to be embedded (`app.engine.embedding`) takes turns with prefill.

States are kept for other requests (`app.engine.prefix_cache`): where the row ends, whatever ended
it, and if they cannot be trimmed also where the prompt's messages begin and end and before its last
token. A request continues from the longest of them that its prompt begins with, or from a row that
still runs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from app.engine import draft_memory, memory
from app.engine.admission import PREFILL_CHUNK, admit, check_prompt, least_of
from app.engine.answer import NOTHING
from app.engine.batch import Batch, Launch, Row
from app.engine.constrained import allowed_tokens
from app.engine.delivery import deliver
from app.engine.embedding import Embeddings
from app.engine.prefix_cache import PrefixCache
from app.engine.prefix_files import PrefixFiles, not_forgotten
from app.engine.preparation import shared_length
from app.engine.protocol import (
    LoadModel,
    ModelRef,
    Progress,
)
from app.engine.residency import Residency
from app.engine.resident import ResidentModel
from app.engine.room import Room, ended_early
from app.engine.snapshot import Snapshot, snapshot_of
from app.engine.speculation import Lanes
from app.engine.state_leaves import always_trimmable
from app.engine.waiting import WaitingQueue
from app.errors import GryphonError

logger = logging.getLogger(__name__)

MAX_ROWS = 16
# Fewer tokens are computed again sooner than states are copied.
_MIN_SHARED = 32
# Without a request for this long, what was read goes to the disk, one entry at a time.
_QUIET_S = 0.5


class Scheduler:
    """Owns the model and the batch.

    `submit`, `cancel` and `stop` may be called from any thread; everything else happens in `run`,
    on the thread that calls it. Events go out through each row's own `emit`.

    Args:
        prefix_cache_bytes: Memory for states kept for later requests, 0 keeps none; None takes a
            tenth of what is available once a model is loaded, at most 2 GiB.
        prefix_files: Where they are kept over a restart; None for nowhere.
        memory_bytes: Caps the memory budget; None is what the machine has.
        keep_alive_s: How long a model stays after its last request; negative or infinite: for ever.
        reads_first: Whether a step is read before the next one is launched; None: on a CPU.
    """

    def __init__(
        self,
        prefix_cache_bytes: int | None = 0,
        prefix_files: PrefixFiles | None = None,
        *,
        memory_bytes: int | None = None,
        keep_alive_s: float = math.inf,
        reads_first: bool | None = None,
    ) -> None:
        self.snapshot = Snapshot()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._queue = WaitingQueue()
        self._prefilling: Row | None = None
        self._batch = Batch()
        self._lanes = Lanes()
        self._embeddings = Embeddings()
        self._embedded_last = False
        self._in_flight: Launch | None = None
        self._reads_first = not memory.on_gpu() if reads_first is None else reads_first
        self._residency = Residency(prefix_cache_bytes, prefix_files, memory_bytes, keep_alive_s)
        self._keep_alive = self._residency.keep_alive
        self._outbox: list[Callable[[], None]] = []
        self.on_idle: Callable[[], None] = lambda: None
        """Called when the model was unloaded because nobody used it."""

    # Called from other threads.

    def submit(self, row: Row) -> None:
        """Queue a request; it ends in exactly one `Finished` or `Failed`."""
        self._inbox.put(lambda: self._enqueue(row))

    def cancel(self, row: Row) -> None:
        """End a request early, wherever it is. Nothing happens when it has ended."""
        self._inbox.put(lambda: self._cancel(row))

    def forget(self, chat: str, ended: Callable[[GryphonError | None], None]) -> None:
        """Drop what is kept of a chat's words; `ended` is told, on the MLX thread."""
        self._inbox.put(lambda: self._outbox.append(functools.partial(ended, self._forget(chat))))

    def save_prefixes(self, seconds: float) -> None:
        """Save what is kept for other requests; returns after this time at the latest."""
        done = threading.Event()
        deadline = time.monotonic() + seconds

        def save() -> None:
            self._residency.save(deadline - time.monotonic())
            done.set()

        self._inbox.put(save)
        done.wait(seconds)

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._stopping.set()
        self._inbox.put(lambda: None)

    @property
    def model_loads(self) -> int:
        """Models made resident so far."""
        return self._residency.loads

    # The MLX thread.

    def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            if self._queue or self._holds_state:
                self._keep_alive.used()
                self._take_inbox(wait_s=0.0)
            else:
                self._rest()
            self._admit()
            self._read()
            if self._batch.rows or self._in_flight is not None:
                self._guarded(self._decode, [*self._batch.rows, *self._in_flight_rows])
            if self._lanes:
                self._guarded(self._speculate, [self._lanes.next().row])
            self._end_turn()

    @property
    def _resident(self) -> ResidentModel | None:
        return self._residency.model

    @property
    def _room(self) -> Room | None:
        return self._residency.room

    @property
    def _prefixes(self) -> PrefixCache | None:
        return self._residency.prefixes

    @property
    def _in_flight_rows(self) -> list[Row]:
        """The rows of the step that has not been read, those that have ended since included."""
        return self._in_flight.rows if self._in_flight is not None else []

    @property
    def _active(self) -> int:
        """Rows being prefilled, decoded or embedded."""
        reading = len(self._embeddings) + (self._prefilling is not None)
        return len(self._batch.rows) + len(self._lanes) + reading

    @property
    def _running(self) -> list[Row]:
        """Rows being prefilled, decoded or embedded, in the order in which they began."""
        rows = [*self._batch.rows, *self._lanes.rows, *self._embeddings.rows]
        if self._prefilling is not None:
            rows.append(self._prefilling)
        return sorted(rows, key=lambda row: row.admitted_s)

    @property
    def _running_of(self) -> Counter[str]:
        """How many of them are each client's."""
        return Counter(row.client for row in self._running)

    @property
    def _holds_state(self) -> bool:
        return bool(self._active) or self._in_flight is not None

    def _rest(self) -> None:
        """Wait for something to do. Meanwhile what is kept goes to the disk, and then the model's
        time may run out."""
        self._publish()
        wait_s = self._keep_alive.remaining_s() if self._resident else None
        # The next question may come at once, and would have to ask the system for memory again.
        if self._take_inbox(wait_s=_QUIET_S if wait_s is None else min(_QUIET_S, wait_s)):
            return
        mx.synchronize()  # what was kept has let go of what it was copied from
        mx.clear_cache()
        self._publish()
        if self._prefixes is not None:
            while self._prefixes.save_next():
                if self._take_inbox(wait_s=0.0):
                    return
        self._take_inbox(wait_s=self._keep_alive.remaining_s() if self._resident else None)
        if self._resident and not self._queue and self._keep_alive.remaining_s() == 0:
            self._unload()
            self.on_idle()

    def _take_inbox(self, *, wait_s: float | None) -> bool:
        """Do what other threads have asked for, after waiting for the first of it; whether there
        was any."""
        try:
            self._inbox.get(timeout=wait_s)()
        except queue.Empty:
            return False
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get(block=False)()
        return True

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
            if self._prefilling in rows:
                self._stop_prefill()
            # Only these rows': a step in flight may well have rows that ended before this.
            if any(row in rows for row in self._batch.rows):
                # The batch's states may be half advanced: none of its rows can go on from them.
                self._batch = Batch()
            if any(row in rows for row in self._in_flight_rows):
                self._in_flight = None
            self._lanes.leave()
            self._embeddings.leave()

    # Arrival and departure.

    def _enqueue(self, row: Row) -> None:
        request = row.request
        send = row.emit
        row.emit = lambda event: self._outbox.append(functools.partial(send, event))
        others = [waiting.request.model for waiting in self._queue]
        if self._resident is not None and self._holds_state:
            others.append(self._resident.ref)
        in_use = next((model for model in others if model != request.model), None)
        if not isinstance(request, LoadModel) and not request.wait_for_model and in_use is not None:
            row.fail(
                "model_busy",
                f"{in_use.name} is in use, so {request.model.name} cannot be loaded now. "
                "Try again later, or let the request wait.",
                retry_after=1.0,
            )
            return
        try:
            self._queue.add(row)
        except GryphonError as error:
            row.fail(error.code, error.message, error.retry_after)

    def _cancel(self, row: Row) -> None:
        if row.done:
            return
        row.finish("cancelled", row.text.finish() if row.text is not None else NOTHING)
        self._queue.remove(row)
        if row is self._prefilling:
            self._keep(row, row.caches)
            self._stop_prefill()
        self._drop(lambda row: row.done)
        self._close_lanes()
        self._embeddings.leave()

    def _drop(self, ended: Callable[[Row], bool]) -> None:
        """Remove rows from the batch; what they have read and written may be continued."""
        if self._prefixes is not None:
            for index, row in enumerate(self._batch.rows):
                if ended(row):
                    self._keep(row, self._batch.states_of(index))
        self._batch.drop(ended)

    def _keep(self, row: Row, states: list[Any]) -> None:
        self._residency.keep(row, states, self._running)

    def _forget(self, chat: str) -> GryphonError | None:
        prefilling = [self._prefilling] if self._prefilling is not None else []
        decoding = [*self._batch.rows, *self._lanes.rows]
        for row in [*self._queue, *prefilling, *decoding, *self._in_flight_rows]:
            if not chat or getattr(row.request, "chat", "") == chat:
                row.is_forgotten = True
        try:
            self._residency.forget(chat)
        except Exception as error:
            logger.exception("forgetting failed")
            return not_forgotten(error)
        return None

    # Admission: at most one model change or one new row per turn.

    def _admit(self) -> None:
        if not self._queue or self._prefilling is not None:
            return
        ref = self._resident.ref if self._resident is not None else None
        row = self._queue.next(ref, self._running_of)
        if row.request.model != ref:
            if self._holds_state:
                self._announce_wait(row)
                return
            if not self._change_model(row):
                return
        if isinstance(row.request, LoadModel):
            self._queue.admit(row)
            self._keep_alive.asked(row.request.keep_alive_s)
            row.finish("stop")
        elif draft := self._lanes.missing_draft(row):
            if self._holds_state:
                self._announce_wait(row)
            else:
                progress = self._load_progress(row, draft)
                load = functools.partial(
                    draft_memory.load_draft, self._lanes, self._residency, row, draft, progress
                )
                self._guarded(load, [row])
                if row.done:
                    self._queue.admit(row)  # others waited for it: that was its client's turn
        elif self._active < (MAX_ROWS if self._resident and self._resident.can_batch else 1):
            if self._has_memory_for(row):
                self._queue.admit(row)
                self._guarded(lambda: self._begin(row), [row])
            elif row.done:
                self._queue.admit(row)  # the same

    def _has_memory_for(self, row: Row) -> bool:
        """Whether a row may begin; a row that never may, or has waited too long, is failed."""
        assert self._resident is not None and self._room is not None
        try:
            if not row.waits_for_memory_s:
                check_prompt(row, self._resident)
            if draft_memory.admits(self._lanes, self._room, row, self._running):
                return True
            self._room.wait(row)
        except GryphonError as error:
            row.fail(error.code, error.message, error.retry_after)
        return False

    def _announce_wait(self, row: Row) -> None:
        if not row.announced_wait and self._resident is not None:
            row.announced_wait = True
            detail = f"waiting for {self._resident.ref.name} to finish"
            row.emit(Progress(row.request.id, "swap", 0, self._active, detail))

    def _change_model(self, row: Row) -> bool:
        """Make the model of `row` resident, or fail everyone who waits for that model."""
        ref = row.request.model

        def unload() -> None:
            self._unload()
            self.snapshot = Snapshot(model=ref, state="loading", queued=len(self._queue))

        try:
            load_s = self._residency.load(ref, unload, self._load_progress(row, ref))
        except GryphonError as error:
            for waiting in [row for row in self._queue if row.request.model == ref]:
                self._queue.remove(waiting)
                waiting.fail(error.code, error.message, error.retry_after)
            return False
        self._queue.begin_turn(load_s)
        return True

    def _unload(self) -> None:
        """Let go of the model and of all that was made with it."""
        self._batch = Batch()
        self._lanes = Lanes()
        self._residency.unload()

    def _load_progress(self, row: Row, ref: ModelRef) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            row.emit(Progress(row.request.id, "load", done, total, f"loading {ref.name}"))
            self._send_events()  # the turn will not end for a while

        return progress

    def _begin(self, row: Row) -> None:
        """Start a row's prefill, or to embed what it asks for."""
        assert self._resident is not None and self._room is not None
        self._keep_alive.asked(row.request.keep_alive_s)
        if row.embedding is not None:
            limit = least_of(self._resident.loaded.context_length, self._room.context)
            self._embeddings.begin(row, limit)
            return
        others_wait = bool(self._batch.rows or self._lanes)
        self._share(row)
        admit(row, self._resident, self._prefixes, self._room, others_wait=others_wait)
        if not row.done:
            self._lanes.open(row, self._resident)
            self._prefilling = row

    def _share(self, row: Row) -> None:
        """Keep the states of a running row that this one's prompt begins as, if they can be
        trimmed: others are kept as they are read."""
        if self._prefixes is None or not self._batch.rows:
            return
        shared = [shared_length(other.fed, row.prompt) for other in self._batch.rows]
        most = max(shared)
        index = shared.index(most)
        if most >= _MIN_SHARED and most > self._prefixes.longest(row.prompt):
            states = self._batch.states_of(index)
            if always_trimmable(states):
                self._keep(self._batch.rows[index], states)

    def _end_newest(self) -> None:
        """End a row for lack of memory, so that the others can go on."""
        rows = self._running
        newest = rows[-1]
        error = ended_early(newest, len(rows))
        newest.fail(error.code, error.message, error.retry_after)
        newest.caches = []
        if newest is self._prefilling:
            self._stop_prefill()
        self._lanes.leave()
        self._embeddings.leave()
        self._batch.drop(lambda row: row.done)

    # Prefill, embeddings and decode.

    def _read(self) -> None:
        """One chunk: of prompts, or of what is to be embedded; by turns."""
        self._embedded_last = bool(self._embeddings) and not (
            self._embedded_last and self._prefilling is not None
        )
        if self._embedded_last:
            self._guarded(self._embed, [self._embeddings.next()])
        else:
            self._prefill()

    def _embed(self) -> None:
        assert self._resident is not None and self._room is not None
        if size := self._room.step(self._running):
            self._embeddings.step(self._resident, size)
        else:
            self._shrink()

    def _shrink(self) -> None:
        """Let go of a draft model that nobody uses, else end a row."""
        assert self._room is not None
        if not draft_memory.give_up_draft(self._lanes, self._room, self._running):
            self._end_newest()

    def _stop_prefill(self) -> None:
        """The row that is prefilled has ended; its states are of no use to it any more."""
        row, self._prefilling = self._prefilling, None
        if row is not None:
            row.caches, row.lane = [], None

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
            # What a lane's draft model has read of the prompt took its part of the turn, too.
            if following is None or following is row or row.lane is not None:
                return
            if len(following.prompt) - 1 - following.processed > room:
                return

    def _prefill_chunk(self) -> None:
        row, resident, memory_room = self._prefilling, self._resident, self._room
        assert row is not None and resident is not None and memory_room is not None
        total = len(row.prompt) - 1
        size = room = memory_room.step(self._running)
        if not size:
            self._shrink()
            return
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
        has_read = room < size
        if has_read and total - row.cached > size:
            row.emit(Progress(row.request.id, "prefill", row.processed + 1, total + 1))
        if row.processed < total or (row.lane is not None and not row.lane.read_prompt(room)):
            return
        # Joining a batch copies the row's states: of a long prompt that is a turn's work by itself.
        if row.lane is None and has_read and total > size and self._batch.rows:
            return
        self._prefilling = None
        resident.loaded.end_prompt(row.caches)
        if row.lane is not None:
            self._lanes.enter(row.lane)
        else:
            self._batch.join(row)
        mx.clear_cache()  # what a chunk computes in fits nothing that decoding does

    def _make_room(self) -> None:
        """See to it that the rows that decode may feed another token each."""
        while self._room is not None and not self._room.can_grow(self._running):
            self._shrink()

    def _decode(self) -> None:
        # A row whose last allowed token is already being computed feeds nothing more.
        self._drop(lambda row: row.launched >= row.max_tokens)
        self._make_room()
        launch = None
        if self._batch.rows:
            assert self._resident is not None
            logits = self._batch.forward(self._resident.loaded.model)
            is_constrained = self._batch.is_constrained
            if not is_constrained:
                launch = self._batch.draw(logits)
            if self._reads_first:
                self._send_in_flight()
            if is_constrained:
                mx.async_eval(logits)
                self._read_in_flight()  # while the logits are computed
                allowed = allowed_tokens(self._batch.rows, logits.shape[-1])
                launch = self._batch.draw(logits, allowed)
            assert launch is not None
            launch.start()
        self._read_in_flight()
        self._in_flight = launch
        self._drop(lambda row: row.done)

    def _speculate(self) -> None:
        lane = self._lanes.latest
        self._make_room()
        if not lane.row.done:
            lane.step(self._deliver)
        self._close_lanes()

    def _close_lanes(self) -> None:
        """Rows leave their lanes: with their end, or for the batch."""
        for row in self._lanes.leave():
            if row.done:
                self._keep(row, row.caches)
                row.caches = []
            else:
                self._batch.join(row)

    def _send_in_flight(self) -> None:
        """Read the step launched before, and send what is no row's end: an end is told when the
        row has left."""
        rows = self._in_flight_rows
        self._read_in_flight()
        if not any(row.done for row in rows):
            self._publish()
            self._send_events()

    def _read_in_flight(self) -> None:
        """Turn the tokens of the step launched before into events."""
        launch, self._in_flight = self._in_flight, None
        if launch is None:
            return
        tokens = launch.token_ids()
        now = time.monotonic()
        for index, row in enumerate(launch.rows):
            if not row.done:
                row.first_token_s = row.first_token_s or now
                self._deliver(row, tokens[index], launch, index)

    def _deliver(self, row: Row, token_id: int, launch: Launch, index: int) -> None:
        assert self._resident is not None
        deliver(row, token_id, launch, index, self._resident.loaded)

    def _end_turn(self) -> None:
        """Events go out after the snapshot that includes what they tell."""
        ref = self._resident.ref if self._resident is not None else None
        self._queue.tell_positions(ref, self._running_of, int(self._prefilling is not None))
        self._publish()
        self._send_events()

    def _send_events(self) -> None:
        for send in self._outbox:
            send()
        self._outbox.clear()

    def _publish(self) -> None:
        reading = [self._prefilling] if self._prefilling is not None else []
        states = sum(int(state.nbytes) for row in reading for state in row.caches)
        self.snapshot = snapshot_of(
            self._residency,
            self._running,
            queued=len(self._queue),
            state_bytes=self._batch.nbytes
            + self._lanes.state_bytes
            + self._embeddings.state_bytes
            + states,
            draft_bytes=self._lanes.weight_bytes,
        )
