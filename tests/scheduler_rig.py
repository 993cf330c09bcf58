"""The scheduler and the matchers' processes as the engine process has them, without a socket."""

from __future__ import annotations

import asyncio
import queue
import threading

from app.engine.batch import Row
from app.engine.matcher import Matchers
from app.engine.protocol import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Token,
    check_request,
)
from app.engine.scheduler import Scheduler
from app.errors import GryphonError


class Rig:
    """Answers requests with `prompt_tokens`, several at once."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.matchers = Matchers()
        self._loop = asyncio.new_event_loop()
        self._threads = [
            threading.Thread(target=self.scheduler.run),
            threading.Thread(target=self._loop.run_forever),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: GenerationRequest) -> tuple[Row, queue.SimpleQueue[Event]]:
        """The row of a request, and where its events come."""
        check_request(request)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        row = Row(request, events.put, list(request.prompt_tokens or []))
        if request.constraint is not None:
            start = self.matchers.start(request.model.path, request.constraint)
            try:
                row.matcher = asyncio.run_coroutine_threadsafe(start, self._loop).result(timeout=60)
            except GryphonError as error:
                row.fail(error.code, error.message)
                return row, events
        self.scheduler.submit(row)
        return row, events

    def events(self, request: GenerationRequest) -> list[Event]:
        """All that is said about a request."""
        return until_end(self.submit(request)[1])

    def answer(self, request: GenerationRequest) -> tuple[str, str]:
        """The text and why it ended."""
        return text_and_reason(self.events(request))

    def failure(self, request: GenerationRequest) -> Failed:
        end = self.events(request)[-1]
        assert isinstance(end, Failed), end
        return end

    def close(self) -> None:
        self.scheduler.stop()
        asyncio.run_coroutine_threadsafe(self.matchers.close(), self._loop).result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        self._loop.close()


def until_end(coming: queue.SimpleQueue[Event]) -> list[Event]:
    """Events up to the terminal one."""
    events = [coming.get(timeout=60)]
    while not isinstance(events[-1], (Finished, Failed)):
        events.append(coming.get(timeout=60))
    return events


def text_and_reason(events: list[Event]) -> tuple[str, str]:
    """What was answered and why it ended; it did not fail."""
    end = events[-1]
    assert isinstance(end, Finished), end
    return "".join(e.text for e in events if isinstance(e, Token)) + end.text, end.reason
