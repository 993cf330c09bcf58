"""The keys, on one page."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = (
    ("Enter", "send"),
    ("Shift+Enter", "new line (or Ctrl+J)"),
    ("Esc", "stop the answer"),
    ("Ctrl+R", "retry the last answer"),
    ("Ctrl+N", "new chat"),
    ("PgUp PgDn", "scroll"),
    ("Tab", "next part of the screen"),
    ("Ctrl+P", "commands, themes"),
    ("Ctrl+Q", "quit; the chat is kept"),
)


class HelpScreen(ModalScreen[None]):
    """Over the chat; any of the usual keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q,f1,question_mark", "dismiss", "Close", show=False),
    ]

    def compose(self) -> ComposeResult:
        lines = [f"{key:<12} {meaning}" for key, meaning in KEYS]
        with VerticalScroll(id="help") as page:
            page.border_title = "Keys"
            page.border_subtitle = "Esc closes"
            yield Static("\n".join(lines), markup=False)
