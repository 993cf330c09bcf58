"""One answer, from the request to its last word: read from the engine, saved as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from app.engine.client import EngineClient
from app.engine.protocol import (
    Accepted,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Progress,
    Token,
    ToolCall,
    ToolCallPart,
)
from app.errors import GryphonError
from app.history.records import AnswerStats, MessageState, StoredMessage
from app.history.saving import SavedAnswer
from app.history.store import History


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
        self.request = request
        self.notice = ""
        """What the engine says about how this runs."""
        self.activity = "waiting"
        self.prompt_tokens = 0
        self.context_length: int | None = None
        self.tokens = 0
        self.stop_asked = False
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self._saved = SavedAnswer(history, row, on_trouble=on_save_failed)
        self._first_token_at = self._last_token_at = 0.0
        self._finish_reason: str | None = None
        self._stats: AnswerStats | None = None

    @property
    def row(self) -> StoredMessage:
        """The message as saved; final once `ended` is set."""
        return self._saved.row

    @property
    def text(self) -> str:
        return self._saved.text

    @property
    def reasoning(self) -> str:
        return self._saved.reasoning

    @property
    def tps(self) -> float:
        """Tokens per second: as seen from here while they come, the engine's own figure after."""
        if self._stats is not None:
            return self._stats.decode_tps
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
                self._saved.add(event.text, event.reasoning)
            case ToolCall():
                self._saved.add_tool_call(ToolCallPart(event.call_id, event.name, event.arguments))
            case Finished():
                self._saved.add(event.text, event.reasoning)
                self.prompt_tokens = event.usage.prompt_tokens
                self.tokens = event.usage.completion_tokens
                self._finish_reason = event.reason
                self._stats = AnswerStats(
                    prompt_tokens=event.usage.prompt_tokens,
                    cached_tokens=event.usage.cached_tokens,
                    completion_tokens=event.usage.completion_tokens,
                    queue_s=event.timings.queue_s,
                    prefill_s=event.timings.prefill_s,
                    decode_s=event.timings.decode_s,
                    context_length=self.context_length,
                )

    def end(self, state: MessageState, error: str | None = None) -> None:
        """Save the whole of it and how it ended. What cannot be saved stays on screen and is tried
        again."""
        self._saved.end(state, finish_reason=self._finish_reason, error=error, stats=self._stats)
        self.activity = "idle"
        self.ended.set()
        self.changed.set()

    def close(self) -> None:
        """Save what still is not, and do not try again."""
        self._saved.save()
        self._saved.stop()


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
