"""The parts of the chat that need no screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.engine.protocol import Message, Progress
from app.history.store import History
from app.printable import printable
from app.tui.answering import describe
from app.tui.chat import Chat
from app.tui.pace import LONGEST_S, SHARE, SHORTEST_S, Pace
from app.tui.session import Session
from app.tui.widgets.status_bar import Status, lay_out

from ..fakes import FakeEngine
from .conftest import MODEL

FULL = Status(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    state="generating",
    tps=12.34,
    context_used=1234,
    context_limit=8192,
    rest="http://127.0.0.1:11500/v1",
)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    history = History(tmp_path / "history.sqlite3")
    yield Chat(history)
    history.close()


@pytest.mark.parametrize("width", range(0, 140))
def test_the_status_bar_fills_its_width_and_keeps_the_state_longest(width: int) -> None:
    text = lay_out(FULL, width)
    assert len(text) == width
    assert text.strip().startswith("generating"[:width]) or "generating" in text


def test_the_status_bar_says_everything_where_there_is_room() -> None:
    assert lay_out(FULL, 120) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct · generating · 12.3 tok/s · context 1234/8192"
        + " " * 14
        + "http://127.0.0.1:11500/v1"
    )
    assert lay_out(FULL, 60).rstrip() == ("SmolLM2-135M-In… · generating · 12.3 tok/s · ctx 15%")
    assert lay_out(FULL, 38).rstrip() == "SmolLM2-135M-In… · generating"


def test_painting_is_spaced_by_what_it_costs() -> None:
    now = [0.0]
    pace = Pace(clock=lambda: now[0])

    def after(cost: float) -> float:
        now[0] += cost
        return pace.next_interval()

    assert after(0.0) == SHORTEST_S
    assert after(0.001) == SHORTEST_S
    assert after(0.05) == pytest.approx(0.05 / SHARE)
    assert after(30.0) == LONGEST_S
    assert after(0.001) == SHORTEST_S


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress("x", "queue", 0, 0), "queued"),
        (Progress("x", "queue", 0, 3), "queued (3 ahead)"),
        (Progress("x", "swap", 0, 0), "swapping models"),
        (Progress("x", "load", 0, 0), "loading"),
        (Progress("x", "load", 999, 1000), "loading 99%"),
        (Progress("x", "prefill", 512, 8000), "prefill 512/8000"),
    ],
)
def test_progress_in_words(progress: Progress, words: str) -> None:
    assert describe(progress) == words


def test_printable_keeps_text_and_shows_controls() -> None:
    assert printable("a\tb\r\nc\rd é 漢 🙂\u200d") == "a\tb\nc\nd é 漢 🙂\u200d"
    assert printable("\x00\x1b[0m\x7f\x9b") == "␀␛[0m␡\ufffd"


def test_turns_alternate_whatever_happened(chat: Chat) -> None:
    chat.say("One")
    failed = chat.begin_answer("m")
    chat.replace_leaf(chat.history.finish(failed.id, "", "failed", error="x"))
    chat.say("Two")
    partial = chat.begin_answer("m")
    chat.replace_leaf(chat.history.finish(partial.id, "Part", "cancelled"))
    chat.say("Three")
    assert chat.request_messages() == [
        Message("user", "One\n\nTwo"),
        Message("assistant", "Part"),
        Message("user", "Three"),
    ]


def test_a_retry_is_a_sibling_and_the_first_answer_stays_in_the_tree(chat: Chat) -> None:
    question = chat.say("Why?")
    first = chat.begin_answer("m")
    second = chat.begin_answer("m")
    assert (first.parent, second.parent) == (question.id, question.id)
    assert [m.id for m in chat.path] == [question.id, second.id]
    assert chat.path == chat.history.path_to_leaf(second.conversation)


def test_an_empty_chat_leaves_no_row(chat: Chat) -> None:
    chat.save_draft("")
    chat.start_new()
    assert chat.history.conversations() == []


async def test_an_answer_dropped_before_its_first_step_is_still_ended(chat: Chat) -> None:
    session = Session(chat.history, MODEL, FakeEngine)  # type: ignore[arg-type]
    session.chat.say("Go")
    session.answer(lambda error: None)
    await session.close()
    assert [m.state for m in session.chat.path] == ["complete", "cancelled"]
    assert session.chat.path == chat.history.path_to_leaf(session.chat.path[0].conversation)
