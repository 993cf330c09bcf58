"""A streaming answer, saved as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from app.engine.protocol import ToolCallPart
from app.errors import GryphonError
from app.history.records import AnswerStats, MessageState, StoredMessage
from app.history.store import History

SAVE_EVERY_S = 0.2
"""How long words wait to be saved; with the time that saving takes, a quarter of a second."""
RETRY_S = 2.0
"""How long a save that failed waits to be tried again."""


class SavedAnswer:
    """Keeps the words of an answer in memory until the file has them: a save that fails, as on a
    full disk, is tried again until it works, also after the answer has ended.

    Lives in an event loop, whose clock it goes by.
    """

    def __init__(
        self,
        history: History,
        row: StoredMessage,
        *,
        on_trouble: Callable[[GryphonError], None],
        on_saved_again: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        row: The answer, in state "streaming"; of one that is continued, the words it has stay.
        on_trouble: Called when saving fails, once until it works again.
        on_saved_again: Called when it does.
        """
        self.row = row
        """The message as it should be in the file; how it ended once `end` was called."""
        self.text = row.content
        self.reasoning = row.reasoning
        self.tool_calls = list(row.tool_calls)
        self.is_saved = True
        """Whether the file has all of it."""
        self._history = history
        self._before = row.stats
        self._on_trouble = on_trouble
        self._on_saved_again = on_saved_again
        self._is_in_trouble = False
        self._has_ended = False
        self._timer: asyncio.TimerHandle | None = None

    def add(self, text: str, reasoning: str = "") -> None:
        """Append to the answer."""
        if not text and not reasoning:
            return
        self.text += text
        self.reasoning += reasoning
        self.is_saved = False
        if self._timer is None:
            self._save_in(SAVE_EVERY_S)

    def add_tool_call(self, call: ToolCallPart) -> None:
        """Append a call; it is saved with the end of the answer."""
        self.tool_calls.append(call)

    def end(
        self,
        state: MessageState,
        *,
        finish_reason: str | None = None,
        error: str | None = None,
        stats: AnswerStats | None = None,
    ) -> StoredMessage:
        """Save the whole of it and how it ended."""
        if self._before is not None and stats is not None:
            stats = self._before.continued(stats)
        self.row = replace(
            self.row,
            content=self.text,
            reasoning=self.reasoning,
            tool_calls=tuple(self.tool_calls),
            state=state,
            finish_reason=finish_reason,
            error=error,
            stats=stats or self._before,
        )
        self._has_ended = True
        self.is_saved = False
        self.save()
        return self.row

    def save(self) -> bool:
        """Save now what is not saved; whether the file has all of it then."""
        self.stop()
        if self.is_saved:
            return True
        try:
            if self._has_ended:
                row = self.row
                self.row = self._history.finish(
                    row.id,
                    row.content,
                    row.state,
                    reasoning=row.reasoning,
                    tool_calls=row.tool_calls,
                    finish_reason=row.finish_reason,
                    error=row.error,
                    stats=row.stats,
                )
            else:
                self._history.update_text(self.row.id, self.text, self.reasoning)
        except GryphonError as error:
            self._save_in(RETRY_S)
            if not self._is_in_trouble:
                self._is_in_trouble = True
                self._on_trouble(error)
            return False
        self.is_saved = True
        if self._is_in_trouble:
            self._is_in_trouble = False
            self._on_saved_again()
        return True

    def stop(self) -> None:
        """Do not save by itself any more, unless something is added. Before the history closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _save_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self.save)
