"""The turns of a conversation."""

from __future__ import annotations

import webbrowser
from urllib.parse import urlsplit

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Markdown, Static

from app.history.records import StoredMessage
from app.printable import printable


class UserMessage(Static):
    """What the person wrote, as they wrote it."""

    def __init__(self, message: StoredMessage) -> None:
        super().__init__(printable(message.content), markup=False)


class AnswerMessage(Vertical):
    """What the model wrote, as Markdown, and one line about how it went."""

    def __init__(self, message: StoredMessage) -> None:
        super().__init__()
        self._message = message

    def compose(self) -> ComposeResult:
        yield Static(printable(self._message.reasoning), classes="thinking", markup=False)
        # Links are opened below: the model wrote them, so a web address or nothing.
        yield Markdown(printable(self._message.content), open_links=False)
        yield Static("", classes="note", markup=False)

    def on_mount(self) -> None:
        self.query_one(".thinking").display = bool(self._message.reasoning)
        if self._message.state != "streaming":
            self._show_ending(self._message)

    @on(Markdown.LinkClicked)
    def open_web_link(self, event: Markdown.LinkClicked) -> None:
        event.stop()
        if urlsplit(event.href).scheme in ("http", "https"):
            webbrowser.open(event.href)

    def show_thinking(self, reasoning: str) -> None:
        """Show all that the model thought so far."""
        thinking = self.query_one(".thinking", Static)
        thinking.update(printable(reasoning))
        thinking.display = bool(reasoning)

    async def add(self, text: str) -> None:
        """Append a piece of the answer."""
        if text:
            await self.query_one(Markdown).append(printable(text))

    def show_activity(self, activity: str) -> None:
        """Say what is waited for, where the answer's first words will be."""
        self._note(f"{activity} …" if activity else "")

    def finish(self, message: StoredMessage) -> None:
        """Say how the answer ended."""
        self._message = message
        self._show_ending(message)

    def _note(self, text: str) -> None:
        note = self.query_one(".note", Static)
        note.update(text)
        note.display = bool(text)

    def _show_ending(self, message: StoredMessage) -> None:
        self._note(ending(message))
        self.set_class(message.state == "failed", "-failed")
        self.set_class(message.state in ("cancelled", "interrupted"), "-stopped")


def ending(message: StoredMessage) -> str:
    """One line on how an answer ended and what can be done about it."""
    match message.state:
        case "failed":
            return f"{printable(message.error or 'The answer failed.')}\nCtrl+R to retry"
        case "cancelled":
            return "cancelled · Ctrl+R to retry"
        case "interrupted" | "streaming":
            return "interrupted: Gryphon ended before the answer did · Ctrl+R to retry"
        case "complete":
            return _figures(message)


def _figures(message: StoredMessage) -> str:
    stats = message.stats
    if stats is None:
        return ""
    count = stats.completion_tokens
    figures = [f"{count} token{'' if count == 1 else 's'}"]
    if tps := stats.decode_tps:
        figures.append(f"{tps:.1f} tok/s")
    if message.finish_reason == "length":
        figures.append("stopped at the length limit")
    return " · ".join(figures)
