"""Where people type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from app.printable import printable

# Terminals without the Kitty protocol cannot tell Shift+Enter from Enter, hence the others.
NEWLINE_KEYS = ("shift+enter", "ctrl+j", "alt+enter")


class Prompt(TextArea):
    """A text area in which Enter sends. It grows with its text, up to a share of the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pageup", "screen.scroll_transcript(-1)", "Scroll up", show=False),
        Binding("pagedown", "screen.scroll_transcript(1)", "Scroll down", show=False),
    ]

    @dataclass
    class Submitted(Message):
        """Enter was pressed. The text stays until the receiver takes it with `clear`."""

        prompt: Prompt
        text: str

    def __init__(self) -> None:
        super().__init__(
            id="prompt",
            soft_wrap=True,
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder="Message · Enter sends · F1 help",
        )

    def on_key(self, event: events.Key) -> None:
        # Here and not as bindings: those run after the event has bubbled up, by when the next
        # letter of somebody who types ahead is in already. The base class, whose own handler
        # would insert a line break on Enter, comes after this one.
        if event.key not in ("enter", *NEWLINE_KEYS):
            return
        event.prevent_default()
        event.stop()
        if event.key == "enter":
            self.post_message(self.Submitted(self, self.text))
        else:
            self._insert("\n")

    def on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        self._insert(printable(event.text))

    def on_text_area_changed(self) -> None:
        self.hint("")

    def hint(self, text: str) -> None:
        """Say something about what was just tried, on the border until the text changes."""
        self.border_subtitle = text

    def _insert(self, text: str) -> None:
        if result := self._replace_via_keyboard(text, *self.selection):
            self.move_cursor(result.end_location)
