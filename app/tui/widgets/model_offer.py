"""The first screen of an empty machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Button, ProgressBar, Static

from app.tui.ports import ModelOffer


class ModelOfferPanel(Vertical):
    """Explains that a model is needed, offers one, and shows its download."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("y", "accept", "Download", show=False)]

    @dataclass
    class Accepted(Message):
        """The person wants the model."""

    def __init__(self, offer: ModelOffer | None) -> None:
        super().__init__(id="offer")
        self._offer = offer

    def compose(self) -> ComposeResult:
        yield Static("Welcome to Gryphon", classes="title", markup=False)
        if self._offer is None:
            yield Static(
                "No model is installed yet. Quit with Ctrl+Q and install one, for example:\n"
                "gryphon pull smollm2-135m",
                markup=False,
            )
            return
        yield Static(
            "Everything runs on this computer. To begin, download a small model: "
            f"{self._offer.name} ({self._offer.size}).",
            markup=False,
        )
        yield Static("", classes="error", markup=False)
        yield Button("Download it (Enter)", id="accept", variant="primary", compact=True)
        yield Static("", classes="doing", markup=False)
        yield ProgressBar(show_eta=False)

    def action_accept(self) -> None:
        self.post_message(self.Accepted())

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.action_accept()

    def show_progress(self, doing: str, done: int, total: int) -> None:
        """Show how far the download has come."""
        self.add_class("-busy")
        self.remove_class("-failed")
        amount = f" {done / 1e6:.0f} of {total / 1e6:.0f} MB" if total > 1e6 else ""
        self.query_one(".doing", Static).update(f"{doing}{amount} · Esc cancels")
        self.query_one(ProgressBar).update(total=total or None, progress=done)

    def show_error(self, sentence: str) -> None:
        """Say why there is no model yet, and offer it again."""
        self.remove_class("-busy")
        self.add_class("-failed")
        self.query_one(".error", Static).update(sentence)
        self.query_one("#accept", Button).label = "Try again (Enter)"
