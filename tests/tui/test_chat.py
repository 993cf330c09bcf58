"""Asking, stopping, failing, retrying: what a person does all day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from app.engine.protocol import Failed, Message, Progress
from app.errors import GryphonError
from app.history.store import History

Chat = Callable[..., Any]

CRASH = Failed(
    id="", code="engine_crashed", message="The engine stopped; it was started again, so ask again."
)


async def test_an_answer_streams_to_the_screen_and_to_the_file(chatting: Chat) -> None:
    gate = asyncio.Event()
    async with chatting([["The sea ", "is **wide", gate, "** and deep."]]) as chat:
        await chat.send("Tell me")
        await chat.until_seen("The sea is")
        await chat.until(
            lambda: (
                chat.saved()
                == [
                    ("user", "Tell me", "complete"),
                    ("assistant", "The sea is **wide", "streaming"),
                ]
            ),
            "the text so far in the file",
        )
        assert "generating" in chat.status
        gate.set()
        await chat.until_answered()
        assert "The sea is wide and deep." in chat.screen_text
        assert chat.saved()[-1] == ("assistant", "The sea is **wide** and deep.", "complete")
        assert chat.notes == ["3 tokens · 10.0 tok/s"]
        assert chat.status == "tiny-model · idle · 10.0 tok/s · context 10/8192"
    assert chat.engine.closed


async def test_the_model_is_asked_with_the_whole_path(chatting: Chat) -> None:
    async with chatting([["One."], ["Two."]]) as chat:
        await chat.send("First")
        await chat.until_answered()
        await chat.send("Second")
        await chat.until(lambda: len(chat.engine.requests) == 2, "a second request")
        request = chat.engine.requests[1]
        conversation = chat.app.session.chat.conversation
        assert request.chat == chat.engine.requests[0].chat == conversation.engine_chat
        assert request.model.name == "tiny-model"
        assert request.messages == [
            Message("user", "First"),
            Message("assistant", "One."),
            Message("user", "Second"),
        ]


async def test_escape_cancels_and_keeps_what_came(chatting: Chat) -> None:
    async with chatting([["Part", asyncio.Event(), "never"]]) as chat:
        await chat.send("Go")
        await chat.until_seen("Part")
        await chat.pilot.press("escape")
        await chat.until_answered()
        assert chat.notes == ["cancelled · Ctrl+R to retry"]
        assert chat.saved()[-1] == ("assistant", "Part", "cancelled")
        assert chat.engine.cancelled == [chat.engine.requests[0].id]
        assert "idle" in chat.status


async def test_a_second_escape_does_not_wait_for_the_engine(chatting: Chat) -> None:
    async with chatting([["Part", asyncio.Event()]]) as chat:

        async def deaf(request_id: str) -> None: ...

        chat.engine.cancel = deaf
        await chat.send("Go")
        await chat.until_seen("Part")
        await chat.pilot.press("escape")
        assert chat.app.session.is_answering
        await chat.pilot.press("escape")
        await chat.until_answered()
        assert chat.saved()[-1] == ("assistant", "Part", "cancelled")


async def test_a_failure_is_one_sentence_inline_and_retry_works(chatting: Chat) -> None:
    async with chatting([["Half ", CRASH], ["Whole answer."]]) as chat:
        await chat.send("My long question")
        await chat.until_answered()
        assert chat.notes == [f"{CRASH.message}\nCtrl+R to retry"]
        assert "My long question" in chat.screen_text and "Half" in chat.screen_text
        assert chat.saved()[-1] == ("assistant", "Half ", "failed")
        await chat.pilot.press("ctrl+r")
        await chat.until_seen("Whole answer.")
        await chat.until_answered()
        assert "Half" not in chat.screen_text
        assert chat.saved() == [
            ("user", "My long question", "complete"),
            ("assistant", "Whole answer.", "complete"),
        ]
        assert chat.engine.requests[1].messages == [Message("user", "My long question")]


async def test_r_retries_when_the_prompt_is_not_being_typed_in(chatting: Chat) -> None:
    async with chatting([[CRASH], ["Fine."]]) as chat:
        await chat.send("Ask")
        await chat.until_answered()
        chat.screen.transcript.focus()
        await chat.pilot.press("r")
        await chat.until_seen("Fine.")
        assert chat.prompt.text == ""


async def test_after_a_failure_a_new_message_may_be_sent_instead(chatting: Chat) -> None:
    async with chatting([[CRASH], ["Fine."]]) as chat:
        await chat.send("One")
        await chat.until_answered()
        await chat.send("Two")
        await chat.until_seen("Fine.")
        assert chat.engine.requests[1].messages == [Message("user", "One\n\nTwo")]


async def test_an_engine_that_cannot_be_had_is_one_sentence(chatting: Chat) -> None:
    async with chatting([]) as chat:

        def refuse(request: object) -> None:
            raise GryphonError("engine_missing", "The engine could not be started.")

        chat.engine.stream = refuse
        await chat.send("Hello")
        await chat.until_answered()
        assert chat.notes == ["The engine could not be started.\nCtrl+R to retry"]


async def test_sending_while_an_answer_comes_keeps_the_text(chatting: Chat) -> None:
    gate = asyncio.Event()
    async with chatting([["Busy", gate]]) as chat:
        await chat.send("First")
        await chat.until_seen("Busy")
        await chat.send("Second")
        await chat.until_seen("Answer still coming")
        assert chat.prompt.text == "Second"
        assert len(chat.engine.requests) == 1
        gate.set()
        await chat.until_answered()


async def test_nothing_is_lost_when_the_file_cannot_be_written(
    chatting: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise GryphonError("history_disk_full", "The disk is full. Free some space.")

    async with chatting([["All ", "of it."]]) as chat:
        with monkeypatch.context() as broken:
            broken.setattr(History, "append", full)
            await chat.send("Precious words")
            await chat.until_seen("The disk is full.")
            assert chat.prompt.text == "Precious words"
        with monkeypatch.context() as broken:
            broken.setattr(History, "update_text", full)
            broken.setattr(History, "finish", full)
            await chat.pilot.press("enter")
            await chat.until_seen("All of it.")
            await chat.until_answered()


async def test_enter_sends_and_other_enters_break_the_line(chatting: Chat) -> None:
    async with chatting([["Ok."]]) as chat:
        await chat.type("a")
        await chat.pilot.press("shift+enter", "b", "ctrl+j", "c", "alt+enter", "d")
        assert chat.prompt.text == "a\nb\nc\nd"
        await chat.pilot.press("enter")
        await chat.until_seen("Ok.")
        assert chat.saved()[0] == ("user", "a\nb\nc\nd", "complete")


async def test_a_paste_keeps_its_lines_and_is_not_sent(chatting: Chat) -> None:
    from textual.events import Paste

    async with chatting() as chat:
        chat.prompt.post_message(Paste("one\r\ntwo\rthree\n\nfour \x1b[31mred\x07"))
        await chat.until(lambda: chat.prompt.text, "pasted text")
        assert chat.prompt.text == "one\ntwo\nthree\n\nfour ␛[31mred␇"
        assert chat.engine.requests == []


async def test_what_a_model_writes_never_reaches_the_terminal_as_a_control(chatting: Chat) -> None:
    async with chatting([["safe \x1b]52;c;aGk=\x07 end"]]) as chat:
        await chat.send("Go")
        await chat.until_seen("end")
        assert "␛]52;c;aGk=␇" in chat.screen_text
        assert "\x1b" not in chat.screen_text


async def test_markup_in_a_message_is_shown_as_typed(chatting: Chat) -> None:
    async with chatting([[Failed(id="", code="x", message="Bad [b]thing[/b].")]]) as chat:
        await chat.send("a [red]b[/red] [")
        await chat.until_seen("Bad [b]thing[/b].")
        assert "a [red]b[/red] [" in chat.screen_text


async def test_empty_messages_are_not_sent(chatting: Chat) -> None:
    async with chatting() as chat:
        await chat.send("   ")
        assert chat.saved() == [] and chat.engine.requests == []


async def test_progress_is_shown_where_the_answer_will_be_and_in_the_status(chatting: Chat) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    answer = [
        Progress(id="", phase="queue", processed=0, total=2),
        gates[0],
        Progress(id="", phase="load", processed=45, total=100),
        gates[1],
        Progress(id="", phase="prefill", processed=1234, total=8000),
        gates[2],
        "Done.",
    ]
    async with chatting([answer]) as chat:
        await chat.send("Go")
        for words, gate in zip(
            ("queued (2 ahead)", "loading 45%", "prefill 1234/8000"), gates, strict=True
        ):
            await chat.until(lambda words=words: words in chat.status, words)
            await chat.until_seen(f"{words} …")
            gate.set()
        await chat.until_answered()
        assert "prefill" not in chat.screen_text


async def test_help_opens_and_closes_without_touching_the_prompt(chatting: Chat) -> None:
    async with chatting() as chat:
        await chat.type("why?")
        await chat.pilot.press("f1")
        await chat.until_seen("new line (or Ctrl+J)")
        await chat.pilot.press("escape")
        await chat.until(lambda: "or Ctrl+J" not in chat.screen_text, "help closed")
        assert chat.prompt.text == "why?" and chat.prompt.has_focus


async def test_the_reader_may_scroll_up_while_an_answer_grows(chatting: Chat) -> None:
    gate = asyncio.Event()
    lines = [f"line {number}\n\n" for number in range(40)]
    async with chatting([[*lines, gate, *lines]], size=(60, 16)) as chat:
        await chat.send("Go")
        await chat.until_seen("line 39")
        await chat.pilot.press("pageup", "pageup")
        await chat.until(lambda: "line 39" not in chat.screen_text, "scrolled up")
        before = chat.screen.transcript.scroll_offset
        gate.set()
        await chat.until_answered()
        assert chat.screen.transcript.scroll_offset == before
