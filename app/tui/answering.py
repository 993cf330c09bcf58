"""One answer, from the request to its last word: read from the engine, saved as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from app.engine.client import EngineClient
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Progress,
    Token,
)
from app.errors import GryphonError
from app.history.records import MessageState, StoredMessage
from app.history.store import History

SAVE_EVERY_S = 0.2


class Answering:
    """Reads at the engine's pace and never waits for the screen; whoever paints looks at these
    attributes at its own pace, woken by `changed`."""

    def __init__(
        self,
        row: StoredMessage,
        request: GenerationRequest,
        *,
        history: History,
        on_save_failed: Callable[[GryphonError], None],
    ) -> None:
        self.row = row
        """The message as saved; final once `ended` is set."""
        self.request = request
        self.text = ""
        self.reasoning = ""
        self.notice = ""
        """What the engine says about how this runs."""
        self.activity = "waiting"
        self.prompt_tokens = 0
        self.context_length: int | None = None
        self.tokens = 0
        self.stop_asked = False
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self._history = history
        self._on_save_failed = on_save_failed
        self._save_timer: asyncio.TimerHandle | None = None
        self._first_token_at = self._last_token_at = 0.0
        self._stats: dict[str, Any] | None = None
        self._is_unsaved = False

    @property
    def tps(self) -> float:
        """Tokens per second: as seen from here while they come, the engine's own figure after."""
        if self._stats is not None:
            return float(self._stats["decode_tps"])
        if self.tokens < 2:
            return 0.0
        elapsed = self._last_token_at - self._first_token_at
        return (self.tokens - 1) / elapsed if elapsed > 0 else 0.0

    async def run(self, engine: EngineClient) -> None:
        """Until the answer ends. Being cancelled ends it at once, with what has come kept."""
        state: MessageState = "failed"
        error: str | None = "The engine ended the answer without saying why."
        try:
            async for event in engine.stream(self.request):
                if isinstance(event, Failed):
                    state, error = "failed", event.message
                elif isinstance(event, Finished):
                    state = "cancelled" if event.reason == "cancelled" else "complete"
                    error = None
                self._take(event)
                self.changed.set()
        except GryphonError as failure:
            state, error = "failed", failure.message
        except asyncio.CancelledError:
            state, error = "cancelled", None
            raise
        finally:
            self.end(state, error)

    def _take(self, event: Event) -> None:
        match event:
            case Accepted():
                self.prompt_tokens = event.prompt_tokens
                self.context_length = event.context_length
                self.notice = event.notice
                self.activity = "prefill"
            case Progress():
                self.activity = describe(event)
            case Token():
                self._last_token_at = time.monotonic()
                if not self.tokens:
                    self._first_token_at = self._last_token_at
                self.tokens += 1
                self.activity = "thinking" if event.reasoning else "generating"
                self._add(event.text, event.reasoning)
            case Finished():
                self._add(event.text, event.reasoning)
                self.prompt_tokens = event.usage.prompt_tokens
                self.tokens = event.usage.completion_tokens
                self._stats = {
                    "reason": event.reason,
                    "usage": msgspec.to_builtins(event.usage),
                    "timings": msgspec.to_builtins(event.timings),
                    "decode_tps": event.timings.decode_tps(event.usage),
                    "context_length": self.context_length,
                }

    def _add(self, text: str, reasoning: str) -> None:
        if not text and not reasoning:
            return
        self.text += text
        self.reasoning += reasoning
        if self._save_timer is None:
            loop = asyncio.get_running_loop()
            self._save_timer = loop.call_later(SAVE_EVERY_S, self._save)

    def _save(self) -> None:
        self._save_timer = None
        try:
            self._history.update_text(self.row.id, self.text, self.reasoning)
        except GryphonError as error:
            self._on_save_failed(error)

    def end(self, state: MessageState, error: str | None = None) -> None:
        """Save the whole of it and how it ended."""
        if self._save_timer is not None:
            self._save_timer.cancel()
        try:
            self.row = self._history.finish(
                self.row.id,
                self.text,
                state,
                error=error,
                stats=self._stats,
                reasoning=self.reasoning,
            )
        except GryphonError as failure:
            # The screen keeps the whole answer; the file has it up to the last save that worked.
            self.row = replace(
                self.row,
                content=self.text,
                state=state,
                error=error,
                stats=self._stats,
                reasoning=self.reasoning,
            )
            self._is_unsaved = True
            self._on_save_failed(failure)
        self.activity = "idle"
        self.ended.set()
        self.changed.set()

    def save_again(self) -> None:
        """Save an ended answer whose save had failed; the file may be writable again.

        Raises:
            GryphonError: it still is not.
        """
        if self._is_unsaved:
            row = self.row
            self._history.finish(
                row.id,
                row.content,
                row.state,
                error=row.error,
                stats=self._stats,
                reasoning=row.reasoning,
            )
            self._is_unsaved = False


def describe(progress: Progress) -> str:
    """What a request is waiting for, short enough for a status bar."""
    match progress.phase:
        case "queue":
            return f"queued ({progress.total} ahead)" if progress.total else "queued"
        case "swap":
            return "swapping models"
        case "load":
            if progress.total:
                return f"loading {100 * progress.processed // progress.total}%"
            return "loading"
        case "prefill":
            return f"prefill {progress.processed}/{progress.total}"
