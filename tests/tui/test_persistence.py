"""Nothing a person typed, and nothing a model answered, is lost between two starts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual import events

from app.engine.protocol import Accepted, Token
from app.errors import GryphonError
from app.history.store import History
from app.tui.app import ChatApp
from app.tui.screens.chat import ChatScreen
from app.tui.widgets.prompt import Prompt
from app.tui.widgets.transcript import PAGE

from ..fakes import FakeEngine
from .conftest import MODEL, Chatting

Chat = Callable[..., Any]


async def test_the_last_chat_is_resumed_and_goes_on(chatting: Chat) -> None:
    async with chatting([["**Fine**, thanks."]]) as chat:
        await chat.send("How are you?")
        await chat.until_answered()
    async with chatting([["Again."]]) as chat:
        await chat.until_seen("Fine, thanks.")
        assert "How are you?" in chat.screen_text
        assert chat.status == "tiny-model · idle · context 8/8192"
        await chat.send("And now?")
        await chat.until_seen("Again.")
        assert [m.content for m in chat.engine.requests[0].messages] == [
            "How are you?",
            "**Fine**, thanks.",
            "And now?",
        ]


async def test_what_the_model_thought_is_shown_saved_and_no_part_of_its_answer(
    chatting: Chat,
) -> None:
    thinking = [Token("", "", 0, reasoning="Let me "), Token("", "", 1, reasoning="think."), "42"]
    accepted = Accepted("", 3, 0, None, "This is a base model.")
    async with chatting([[accepted, *thinking]]) as chat:
        await chat.send("What is it?")
        await chat.until_answered()
        await chat.until_seen("Let me think.")
        await chat.until_seen("This is a base model.")
    assert chat.saved()[-1] == ("assistant", "42", "complete")
    async with chatting([["Still 42"]]) as chat:
        await chat.until_seen("Let me think.")
        await chat.send("Sure?")
        await chat.until_answered()
        answer = chat.engine.requests[0].messages[1]
        assert (answer.content, answer.reasoning) == ("42", "Let me think.")


async def test_quitting_in_the_middle_of_an_answer_saves_what_came(chatting: Chat) -> None:
    async with chatting([["Half an answer", asyncio.Event()]]) as chat:
        await chat.send("Go")
        await chat.until_seen("Half an answer")
        await chat.pilot.press("ctrl+q")
    assert chat.saved() == [
        ("user", "Go", "complete"),
        ("assistant", "Half an answer", "cancelled"),
    ]
    assert chat.engine.closed
    assert chat.engine.cancelled == [chat.engine.requests[0].id]


async def test_quitting_while_words_pour_in_ends_quietly(chatting: Chat) -> None:
    """The painter must be gone before the widgets are; a traceback fails the test."""
    flowing = asyncio.Event()
    flowing.set()  # waited for between two words: lets everything else run in between
    words = [piece for n in range(5000) for piece in (f"word{n} ", flowing)]
    async with chatting([words]) as chat:
        await chat.until(lambda: chat.has_begun, "begun")
        chat.prompt.post_message(Prompt.Submitted(chat.prompt, "Go"))
        while len(chat.saved()) < 2:
            await asyncio.sleep(0)
        chat.app.exit()
    (_, answer) = chat.saved()
    assert answer[2] == "cancelled"


async def test_an_answer_cut_off_by_kill_9_is_shown_as_interrupted(
    chatting: Chat, history_path: Path
) -> None:
    dying = (
        "import os, signal, sys; from pathlib import Path\n"
        "from app.history.store import History\n"
        "history = History(Path(sys.argv[1])); chat = history.create_conversation()\n"
        "asked = history.append(chat.id, None, 'user', 'Count')\n"
        "row = history.append(chat.id, asked.id, 'assistant', '', model='m', state='streaming')\n"
        "history.update_text(row.id, 'one two')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", dying, str(history_path)], check=False)
    async with chatting([["one two three"]]) as chat:
        await chat.until_seen("one two")
        assert chat.notes == ["interrupted: Gryphon ended before the answer did · Ctrl+R to retry"]
        await chat.pilot.press("ctrl+r")
        await chat.until_seen("one two three")


async def test_a_question_without_an_answer_can_be_asked_again(
    chatting: Chat, history_path: Path
) -> None:
    history = History(history_path)
    history.append(history.create_conversation().id, None, "user", "Anybody there?")
    history.close()
    async with chatting([["Yes."]]) as chat:
        await chat.until_seen("Not answered yet · Ctrl+R to ask again")
        await chat.pilot.press("ctrl+r")
        await chat.until_seen("Yes.")
        assert "Not answered yet" not in chat.screen_text


async def test_a_draft_survives_quitting_and_is_gone_once_sent(chatting: Chat) -> None:
    async with chatting() as chat:
        await chat.type("half a")
        await chat.pilot.press("ctrl+j")
        await chat.type("thought")
        await chat.pilot.press("ctrl+q")
    async with chatting([["Ok."]]) as chat:
        await chat.until(lambda: chat.prompt.text == "half a\nthought", "the draft")
        await chat.type("!")
        await chat.pilot.press("enter")
        await chat.until_answered()
    async with chatting() as chat:
        await chat.until_seen("half a")
        assert chat.prompt.text == ""
        assert chat.saved()[0] == ("user", "half a\nthought!", "complete")


async def test_letters_that_wait_for_the_prompt_are_not_lost_by_quitting(
    chatting: Chat, history_path: Path
) -> None:
    text = "typed faster than the screen could follow"
    async with chatting() as chat:
        for letter in text:
            chat.app.post_message(events.Key("space" if letter == " " else letter, letter))
        chat.app.post_message(events.Key("ctrl+q", None))
        await chat.until(lambda: not chat.app.is_running, "the end")
    history = History(history_path)
    assert [c.draft for c in history.conversations()] == [text]
    history.close()


async def test_a_draft_is_saved_while_typing(chatting: Chat, history_path: Path) -> None:
    async with chatting() as chat:
        await chat.type("unsent")
        history = History(history_path)
        await chat.until(
            lambda: (latest := history.latest()) and latest.draft == "unsent", "the draft on disk"
        )
        for _ in "unsent":
            await chat.pilot.press("backspace")
        await chat.until(lambda: history.latest() is None, "no trace of an empty chat")
        history.close()


async def test_new_chat_starts_empty_and_what_is_typed_comes_along(
    chatting: Chat, history_path: Path
) -> None:
    async with chatting([["Old answer."], ["New answer."]]) as chat:
        await chat.send("Old question")
        await chat.until_answered()
        await chat.type("New question")
        await chat.pilot.press("ctrl+n")
        await chat.until(lambda: "Old" not in chat.screen_text, "an empty chat")
        assert chat.status == "tiny-model · idle"
        await chat.pilot.press("enter")
        await chat.until_seen("New answer.")
        assert [m.content for m in chat.engine.requests[1].messages] == ["New question"]
    history = History(history_path)
    assert [c.title for c in history.conversations()] == ["New question", "Old question"]
    assert [c.draft for c in history.conversations()] == ["", ""]
    history.close()


async def test_new_chat_in_the_middle_of_an_answer_keeps_what_came(chatting: Chat) -> None:
    async with chatting([["Half", asyncio.Event()]]) as chat:
        await chat.send("Go")
        await chat.until_seen("Half")
        await chat.pilot.press("ctrl+n")
        await chat.until(lambda: "Half" not in chat.screen_text, "an empty chat")
        assert chat.saved()[-1] == ("assistant", "Half", "cancelled")


async def test_a_chat_open_in_another_gryphon_is_left_to_it(
    chatting: Chat, history_path: Path
) -> None:
    holding = (
        "import sys; from pathlib import Path; from app.history.store import History\n"
        "history = History(Path(sys.argv[1])); chat = history.create_conversation()\n"
        "history.append(chat.id, None, 'user', 'Mine'); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(history_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        async with chatting([["Hello."]]) as chat:
            await chat.until_seen("open in another Gryphon")
            assert "Mine" not in chat.screen_text
            await chat.send("Me too")
            await chat.until_answered()
            assert chat.saved()[0][1] == "Me too"


async def test_a_long_chat_opens_at_its_end_and_shows_the_rest_when_asked(
    chatting: Chat, history_path: Path
) -> None:
    history = History(history_path)
    parent = None
    chat_id = history.create_conversation().id
    for number in range(PAGE + 5):
        parent = history.append(chat_id, parent, "user", f"message {number}").id
    history.close()
    async with chatting() as chat:
        await chat.until_seen(f"message {PAGE + 4}")
        assert len(chat.screen.query("UserMessage")) == PAGE
        chat.screen.query_one("#earlier").press()
        await chat.until(
            lambda: len(chat.screen.query("UserMessage")) == PAGE + 5, "the earlier messages"
        )
        assert not chat.screen.query("#earlier")
        await chat.until_seen("message 5")


async def test_a_message_sent_before_the_last_chat_is_shown_goes_into_it(
    chatting: Chat, history_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with chatting([["Old answer."]]) as chat:
        await chat.send("Old question")
        await chat.until_answered()

    begin = ChatScreen._begin

    async def begin_late(screen: ChatScreen) -> None:
        screen.prompt.load_text("New question")
        await screen.send(Prompt.Submitted(screen.prompt, "New question"))
        await begin(screen)

    monkeypatch.setattr(ChatScreen, "_begin", begin_late)
    history = History(history_path)
    engine = FakeEngine([["New answer."]])
    app = ChatApp(history=history, model=MODEL, engine_factory=lambda: engine)  # type: ignore
    async with app.run_test() as pilot:
        await Chatting(app, pilot, engine).until_seen("New answer.")
        assert [m.content for m in engine.requests[0].messages or []] == [
            "Old question",
            "Old answer.",
            "New question",
        ]
    history.close()


async def test_an_answer_whose_save_failed_is_saved_when_the_file_can_be_written_again(
    chatting: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = GryphonError("history_disk_full", "The disk is full.")
    genuine = History.finish

    def failing(*arguments: Any, **options: Any) -> Any:
        raise full

    async with chatting([["A long and ", "good answer."], ["More."]]) as chat:
        monkeypatch.setattr(History, "finish", failing)
        await chat.send("Go")
        await chat.until_seen("The disk is full.")
        monkeypatch.setattr(History, "finish", genuine)
        await chat.send("On")
        await chat.until_seen("More.")
    assert ("assistant", "A long and good answer.", "complete") in chat.saved()


async def test_a_damaged_history_is_set_aside_and_said(chatting: Chat, history_path: Path) -> None:
    history_path.write_bytes(b"no database at all" * 100)
    async with chatting([["Hello."]]) as chat:
        await chat.until_seen("The chat history was damaged")
        await chat.send("Anyway")
        await chat.until_seen("Hello.")
    assert len(list(history_path.parent.glob("*.damaged-*"))) == 1


async def test_the_engine_forgets_what_was_deleted_before_a_kill(
    chatting: Chat, history_path: Path
) -> None:
    history = History(history_path)
    doomed = history.create_conversation()
    history.append(doomed.id, None, "user", "secret")
    history.delete_conversation(doomed.id)
    history.close()
    async with chatting() as chat:
        engine = chat.engine
    assert engine.forgotten == [doomed.engine_chat]


async def test_a_chat_open_elsewhere_does_not_hide_the_one_before_it(
    chatting: Chat, history_path: Path
) -> None:
    async with chatting([["First answer."]]) as chat:
        await chat.send("first chat")
        await chat.until_answered()
    holding = (
        "import sys; from pathlib import Path\n"
        "from app.history.store import History\n"
        "history = History(Path(sys.argv[1]))\n"
        "chat = history.create_conversation()\n"
        "history.append(chat.id, None, 'user', 'second chat')\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    elsewhere = subprocess.Popen(
        [sys.executable, "-c", holding, str(history_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert elsewhere.stdout is not None and elsewhere.stdout.readline() == b"open\n"
    try:
        async with chatting([]) as chat:
            await chat.until_seen("first chat")
            assert "open in another Gryphon" in chat.screen_text
    finally:
        elsewhere.communicate()
