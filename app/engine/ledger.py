"""What the requests of this engine are doing, and what has become of those that ended.

Kept from the events on their way to the clients, on the event loop's thread alone, so that the MLX
thread does nothing for it. Logs one line for each request that ends: who asked, how much, how long,
how it ended, and never a word of what was said.
"""

from __future__ import annotations

import bisect
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from app.engine.protocol import (
    Accepted,
    Counters,
    Embed,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Histogram,
    LoadModel,
    Phase,
    Progress,
    RequestStatus,
    Token,
)

logger = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
# Names are what clients chose; no list or line grows with them.
_SHOWN_CHARACTERS = 200


def line(what: str, **values: object) -> str:
    """A line for the log that people and programs read: `what key=value key="text"`.

    Text is quoted as in JSON, so that none of it looks like another field or another line.
    """
    pairs = [f"{key}={_spelled(value)}" for key, value in values.items() if value is not None]
    return " ".join([what, *pairs])


def _spelled(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else json.dumps(value)


@dataclass
class _Tally:
    """A histogram being filled."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def histogram(self) -> Histogram:
        return Histogram(list(self.bounds), list(self.counts), self.total)


@dataclass
class _Entry:
    """A request under way; times as of `time.monotonic`."""

    id: str
    client: str
    model: str
    is_load: bool
    phase: Phase
    began_s: float = field(default_factory=time.monotonic)
    accepted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    def status(self, now: float) -> RequestStatus:
        return RequestStatus(
            id=self.id,
            client=self.client,
            model=self.model,
            phase=self.phase,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            seconds=now - self.began_s,
        )


class Ledger:
    """Requests under way and the counts of those before, since this engine started."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._finished: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._queue_s = _Tally(_SECONDS)
        self._first_token_s = _Tally(_SECONDS)
        self._between_tokens_s = _Tally(_TOKEN_SECONDS)
        self._request_s = _Tally(_SECONDS)

    def began(self, connection: str, request: GenerationRequest | Embed | LoadModel) -> None:
        """A request has arrived, with an id that none of the connection has."""
        is_load = isinstance(request, LoadModel)
        client = "" if isinstance(request, LoadModel) else request.client
        self._entries[connection, request.id] = _Entry(
            request.id[:_SHOWN_CHARACTERS],
            (client or connection)[:_SHOWN_CHARACTERS],
            request.model.name[:_SHOWN_CHARACTERS],
            is_load,
            "queued" if is_load else "preparing",
        )

    def queued(self, connection: str, request_id: str) -> None:
        """Its prompt is prepared."""
        self._entries[connection, request_id].phase = "queued"

    def refused(self, code: str) -> None:
        """A request was refused before it was one."""
        self._failed[code] += 1

    def saw(self, connection: str, event: Event) -> None:
        """An event is on its way to its client, whether that is still there or not."""
        if not isinstance(event, (Accepted, Progress, Token, Finished, Failed)):
            return
        entry = self._entries.get((connection, event.id))
        if entry is None:
            return
        if isinstance(event, Progress):
            self._progressed(entry, event)
        elif isinstance(event, Accepted):
            self._accepted(entry, event)
        elif isinstance(event, Token):
            self._read(entry)
        else:
            del self._entries[connection, event.id]
            self._ended(entry, event)

    def statuses(self) -> list[RequestStatus]:
        """The requests under way, oldest first."""
        now = time.monotonic()
        return [entry.status(now) for entry in self._entries.values()]

    def counters(self, model_loads: int) -> Counters:
        return Counters(
            finished=dict(self._finished),
            failed=dict(self._failed),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            model_loads=model_loads,
            queue_s=self._queue_s.histogram(),
            first_token_s=self._first_token_s.histogram(),
            between_tokens_s=self._between_tokens_s.histogram(),
            request_s=self._request_s.histogram(),
        )

    def _progressed(self, entry: _Entry, event: Progress) -> None:
        if event.phase == "prefill":
            entry.phase = "prefill"
        else:
            entry.phase = "loading" if event.phase == "load" else "queued"

    def _accepted(self, entry: _Entry, event: Accepted) -> None:
        entry.phase = "prefill"
        entry.accepted_s = time.monotonic()
        entry.prompt_tokens, entry.cached_tokens = event.prompt_tokens, event.cached_tokens
        self._prompt_tokens += event.prompt_tokens
        self._cached_tokens += event.cached_tokens
        self._queue_s.add(entry.accepted_s - entry.began_s)

    def _read(self, entry: _Entry) -> None:
        now = time.monotonic()
        if entry.first_token_s is None:
            entry.phase = "decode"
            entry.first_token_s = now
            self._first_token_s.add(now - entry.began_s)
        else:
            self._between_tokens_s.add(now - entry.last_token_s)
        entry.last_token_s = now
        entry.generated_tokens += 1
        self._generated_tokens += 1

    def _ended(self, entry: _Entry, event: Finished | Failed) -> None:
        now = time.monotonic()
        if not entry.is_load:
            if isinstance(event, Finished):
                self._finished[event.reason] += 1
                self._request_s.add(now - entry.began_s)
            else:
                self._failed[event.code] += 1
        accepted_s = now if entry.accepted_s is None else entry.accepted_s
        first_token_s = now if entry.first_token_s is None else entry.first_token_s
        logger.info(
            "%s",
            line(
                "load ended" if entry.is_load else "request ended",
                id=entry.id,
                client=entry.client,
                model=entry.model,
                reason=event.reason if isinstance(event, Finished) else None,
                code=event.code if isinstance(event, Failed) else None,
                prompt_tokens=entry.prompt_tokens,
                cached_tokens=entry.cached_tokens,
                generated_tokens=entry.generated_tokens,
                queue_s=accepted_s - entry.began_s,
                prefill_s=first_token_s - accepted_s,
                decode_s=now - first_token_s,
            ),
        )
