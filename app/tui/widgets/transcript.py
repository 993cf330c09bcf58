"""The conversation, oldest turn first."""

from __future__ import annotations

from collections.abc import Sequence

from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Button, Static

from app.history.records import StoredMessage
from app.tui.widgets.message import AnswerMessage, UserMessage

PAGE = 30
"""Messages mounted at a time: a long chat opens as fast as a short one."""


class Transcript(VerticalScroll):
    """Stays at the newest line while it grows, unless the reader has scrolled up."""

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._earlier: list[StoredMessage] = []

    def on_mount(self) -> None:
        self.anchor()

    async def show(self, messages: Sequence[StoredMessage]) -> None:
        """Replace everything by these messages."""
        await self.remove_children()
        self._earlier = list(messages[:-PAGE])
        await self.mount_all([*self._earlier_button(), *map(turn, messages[-PAGE:])])
        self.anchor()

    async def add(self, widget: Widget) -> None:
        """Append a turn or a notice and go to it."""
        await self.mount(widget)
        self.anchor()

    async def remove_last_answer(self) -> None:
        """Make room for another answer to the last question."""
        turns = self.query(".turn")
        if turns and isinstance(turns.last(), AnswerMessage):
            await turns.last().remove()

    async def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id != "earlier":
            return
        event.stop()
        page, self._earlier = self._earlier[-PAGE:], self._earlier[:-PAGE]
        first = self.query(".turn").first()
        await event.button.remove()
        await self.mount_all([*self._earlier_button(), *map(turn, page)], before=first)
        self.scroll_to_widget(first, animate=False, top=True)

    def _earlier_button(self) -> list[Widget]:
        if not self._earlier:
            return []
        return [Button(f"Show earlier messages ({len(self._earlier)})", id="earlier", compact=True)]


class Notice(Static):
    """A sentence from Gryphon itself, between the turns."""

    def __init__(self, text: str, *, is_error: bool = False) -> None:
        super().__init__(text, markup=False, classes="-error" if is_error else "")
        self.text = text


def turn(message: StoredMessage) -> UserMessage | AnswerMessage:
    """The widget for a message."""
    widget = UserMessage(message) if message.role == "user" else AnswerMessage(message)
    widget.add_class("turn")
    return widget
