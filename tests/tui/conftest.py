"""A chat over a scripted engine, and ways to wait for what a person would see."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from app.history.store import History
from app.library.installed import InstalledModel
from app.tui.app import ChatApp
from app.tui.ports import ModelOffer, Server
from app.tui.screens.chat import ChatScreen
from app.tui.widgets.model_offer import ModelOfferPanel
from app.tui.widgets.prompt import Prompt
from app.tui.widgets.status_bar import StatusBar, lay_out

from ..fakes import FakeEngine

MODEL = InstalledModel(
    name="tiny-model",
    path=Path("/models/tiny-model"),
    family="open-llama",
    size_bytes=1,
    quantization="4-bit",
    context_length=8192,
    source="gryphon",
    modified=0.0,
)


@dataclass
class Chatting:
    """A running app, as a person sees it."""

    app: ChatApp
    pilot: Pilot[None]
    engine: FakeEngine

    @property
    def screen(self) -> ChatScreen:
        return self.app.chat_screen

    @property
    def prompt(self) -> Prompt:
        return self.screen.query_one(Prompt)

    @property
    def has_begun(self) -> bool:
        """The last chat is shown, and the engine started or a model offered."""
        if self.app.session.model is None:
            return bool(self.screen.query(ModelOfferPanel))
        return self.engine.started and self.app.session.state == "idle"

    @property
    def status(self) -> str:
        """The status bar as wide as it likes."""
        return " ".join(lay_out(self.screen.query_one(StatusBar).status, 200).split())

    @property
    def screen_text(self) -> str:
        """Every visible cell, as text."""
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in lines)

    @property
    def notes(self) -> list[str]:
        """The line under each answer."""
        return [str(note.render()) for note in self.screen.query(".note").results(Static)]

    def saved(self) -> list[tuple[str, str, str]]:
        """Role, text and state of the last chat's messages, read by a connection of its own."""
        history = History(self.app.session.chat.history.path)
        try:
            latest = history.latest()
            path = history.path_to_leaf(latest.id) if latest else []
        finally:
            history.close()
        return [(m.role, m.content, m.state) for m in path]

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Let the app run until `condition` holds."""
        for _ in range(500):
            if condition():
                return
            await self.pilot.pause(0.01)
        raise AssertionError(f"never: {what}\n{self.screen_text}")

    async def until_seen(self, text: str) -> None:
        await self.until(lambda: text in self.screen_text, f"{text!r} on screen")

    async def type(self, text: str) -> None:
        """Key by key, as a person does."""
        for character in text:
            await self.pilot.press(character)

    async def send(self, text: str) -> None:
        self.prompt.insert(text)
        await self.pilot.press("enter")

    async def until_answered(self) -> None:
        await self.until(
            lambda: self.app.session.answering and not self.app.session.is_answering, "answered"
        )
        await self.until(lambda: all(self.notes), "the end of the answer on screen")


@pytest.fixture
def history_path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def chatting(history_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def run(
        answers: Sequence[Any] = (),
        *,
        engine: FakeEngine | None = None,
        model: InstalledModel | None = MODEL,
        offer: ModelOffer | None = None,
        server: Server | None = None,
        size: tuple[int, int] = (80, 24),
    ) -> AsyncIterator[Chatting]:
        engine = engine or FakeEngine(answers)
        history = History(history_path)
        app = ChatApp(
            history=history,
            model=model,
            engine_factory=lambda: engine,  # type: ignore[arg-type,return-value]
            offer=offer,
            server=server,
        )
        try:
            async with app.run_test(size=size) as pilot:
                chat = Chatting(app, pilot, engine)
                await chat.until(lambda: chat.has_begun, "what follows the first paint")
                yield chat
        finally:
            history.close()

    return run
