"""The engine, the endpoint, the terminal: what the chat stands on may be late, small or missing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from app.engine.protocol import Event, Failed, Finished, ModelRef, Progress, Timings, Usage
from app.errors import GryphonError
from app.history.store import History
from app.tui.app import ChatApp

from ..fakes import FakeEngine
from .conftest import MODEL, Chatting

Chat = Callable[..., Any]


class LoadingEngine(FakeEngine):
    """Loads when told to, and fails to when told so."""

    def __init__(self, outcome: Event | None = None) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.outcome = outcome
        self.loads = 0

    async def load(self, model: ModelRef) -> AsyncIterator[Event]:
        self.loads += 1
        yield Progress(id="load", phase="load", processed=3, total=10, detail=model.name)
        await self.gate.wait()
        yield self.outcome or Finished(
            id="load", reason="stop", usage=Usage(0, 0, 0), timings=Timings(0.0, 0.0, 0.0)
        )


class FakeServer:
    def __init__(self, failure: GryphonError | None = None) -> None:
        self.url = "http://127.0.0.1:11500/v1"
        self.failure = failure

    def start(self) -> None:
        if self.failure:
            raise self.failure

    def stop(self) -> None: ...


async def test_the_model_loads_while_the_person_types(history_path: Path) -> None:
    engine = LoadingEngine()
    history = History(history_path)
    app = ChatApp(history=history, model=MODEL, engine_factory=lambda: engine)  # type: ignore
    async with app.run_test() as pilot:
        chat = Chatting(app, pilot, engine)
        await chat.until(lambda: chat.status == "tiny-model · loading 30%", "loading")
        await chat.type("early")
        assert chat.prompt.text == "early"
        engine.gate.set()
        await chat.until(lambda: chat.status == "tiny-model · idle", "loaded")
        assert chat.prompt.text == "early"
    history.close()


async def test_the_engine_is_not_made_before_the_first_paint(history_path: Path) -> None:
    painted: list[bool] = []
    history = History(history_path)

    def factory() -> Any:
        painted.append("Enter sends" in Chatting(app, None, FakeEngine()).screen_text)  # type: ignore
        return FakeEngine()

    app = ChatApp(history=history, model=MODEL, engine_factory=factory)
    async with app.run_test() as pilot:
        await Chatting(app, pilot, FakeEngine()).until(lambda: painted, "an engine")
    assert painted == [True]
    history.close()


async def test_a_model_that_cannot_be_loaded_is_one_sentence_and_can_be_retried(
    chatting: Chat,
) -> None:
    engine = LoadingEngine(
        Failed(id="load", code="bad_weights", message="The weights are damaged.")
    )
    engine.gate.set()
    async with chatting(engine=engine, model=None) as chat:
        chat.app.session.model = MODEL
        chat.screen._load_model()
        await chat.until_seen("The weights are damaged.")
        assert chat.status == "tiny-model · not loaded"
        engine.outcome = None
        await chat.pilot.press("ctrl+r")
        await chat.until(lambda: engine.loads == 2 and "idle" in chat.status, "loaded")
        assert "damaged" not in chat.screen_text


async def test_the_endpoint_is_shown_when_it_runs(chatting: Chat) -> None:
    async with chatting(server=FakeServer()) as chat:
        await chat.until(lambda: "http://127.0.0.1:11500/v1" in chat.status, "the address")


async def test_a_taken_port_is_a_notice_and_the_chat_goes_on(chatting: Chat) -> None:
    busy = GryphonError("port_in_use", "Port 11500 is in use. Use --port.")
    async with chatting([["Fine."]], server=FakeServer(busy)) as chat:
        await chat.until(lambda: "REST off" in chat.status, "the endpoint being off")
        await chat.until_seen("Port 11500 is in use. Use --port.")
        await chat.send("Still there?")
        await chat.until_seen("Fine.")


@pytest.mark.parametrize("size", [(39, 24), (80, 11), (10, 3), (1, 1)])
async def test_a_terminal_too_small_says_so_and_recovers(
    chatting: Chat, size: tuple[int, int]
) -> None:
    async with chatting() as chat:
        await chat.pilot.resize_terminal(*size)
        await chat.until(lambda: "╭" not in chat.screen_text, "the chat covered")
        if size[0] > 1:
            await chat.until_seen("Terminal")
        await chat.type("still typing")
        await chat.pilot.resize_terminal(40, 12)
        await chat.until_seen("still typing")
        assert "too small" not in chat.screen_text


async def test_forty_columns_are_enough(chatting: Chat) -> None:
    async with chatting([["An answer that is long enough to wrap."]], size=(40, 12)) as chat:
        await chat.send("A question that is long enough to wrap too")
        await chat.until_answered()
        lines = chat.screen_text.splitlines()
        assert all(len(line) == 40 for line in lines)
        assert lines[-1].startswith(" tiny-model · idle · ")


async def test_no_color_is_respected_and_errors_are_told_apart_without_it(
    chatting: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with chatting([[Failed(id="", code="x", message="Bad.")]]) as chat:
        await chat.send("Go")
        await chat.until_answered()
        assert chat.app.no_color
        assert "▌ Bad." in chat.screen_text


def test_importing_the_chat_never_imports_mlx() -> None:
    code = (
        "import sys, app.tui, app.tui.app\n"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('mlx', 'mlx_lm', 'metal', 'transformers', 'numpy')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
