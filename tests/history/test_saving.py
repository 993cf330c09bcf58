"""Streaming answers: nearly nothing is lost at kill -9, and nothing on a disk that was full."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.protocol import ToolCallPart
from app.errors import GryphonError
from app.history.records import AnswerStats
from app.history.saving import SavedAnswer
from app.history.store import History

from ..rounds import rounds

TICK_MS = 10
LATEST_TICKS = 250 // TICK_MS

# The clock of its loop goes 10 ms a piece, however slow the machine is.
_WRITER = f"""
import asyncio, sys
from pathlib import Path
from app.history import database
database.BUSY_TIMEOUT_S = 60  # this machine may be a busy one
from app.history.saving import SavedAnswer
from app.history.store import History

class Loop(asyncio.SelectorEventLoop):
    ticks = 0
    def time(self):
        return self.ticks * {TICK_MS / 1000}

def trouble(error):
    print("trouble", error.code, file=sys.stderr, flush=True)

async def write():
    history = History(Path(sys.argv[1]))
    chat = history.create_conversation()
    question = history.append(chat.id, None, "user", "Count.")
    number = 0
    while True:
        row = history.append(chat.id, question.id, "assistant", "", model="m", state="streaming")
        answer = SavedAnswer(history, row, on_trouble=trouble)
        for _ in range(300):
            loop.ticks += 1
            answer.add(f" {{number}}", f" {{number}}")
            print(row.id, number, flush=True)
            number += 1
            await asyncio.sleep(0)
        answer.end("complete", stats=None)

loop = Loop()
loop.run_until_complete(write())
"""

_RIVAL = """
import random, sys
from pathlib import Path
from app.history import database
database.BUSY_TIMEOUT_S = 60
from app.history.store import History
history = History(Path(sys.argv[1]))
chat = history.create_conversation()
parent = history.append(chat.id, None, "user", "rival").id
for number in range(1_000_000):
    message = history.append(chat.id, parent, "assistant", f"rival {number} " * 20)
    if number % 3 == 0:
        history.delete_message(message.id)
    history.save_draft(chat.id, f"draft {number}")
"""


@pytest.mark.parametrize("seed", rounds(3))
def test_kill_9_under_load_loses_at_most_250_ms_of_text(
    path: Path, seed: int, record_property: pytest.RecordProperty
) -> None:
    draw = random.Random(seed)
    History(path).close()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        for script in (_WRITER, _RIVAL)
    ]
    writer, rival = processes
    assert writer.stdout is not None and rival.stdout is not None
    lines = [writer.stdout.readline() for _ in range(draw.randrange(1, 1200))]
    for process in draw.sample(processes, 2):
        process.kill()
    lines += writer.stdout.readlines()
    for process in processes:
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if not lines[-1].endswith("\n"):
        lines.pop()
    row, last = map(int, lines[-1].split())

    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()
    history = History(path)
    assert history.notice == ""
    chat = history.message(row).conversation
    assert history.claim(chat)
    question, answer = history.path_to_leaf(chat)
    assert question.content == "Count.", "reopened where it was"
    if answer.id == row:
        # The first number of an answer is the multiple of 300 before it.
        saved = [int(word) for word in answer.content.split()]
        first = last - last % 300
        assert saved == list(range(first, first + len(saved))), "in order, without gaps"
        missing = last + 1 - (first + len(saved))
        assert missing <= LATEST_TICKS
        assert answer.reasoning == answer.content
        assert answer.state in ("interrupted", "complete")
    else:
        assert (answer.content, answer.id > row) == ("", True), "the next one had just begun"
        missing = 0
    whole = [m for m in history.tree(chat) if m.role == "assistant" and m.id < row]
    assert all(len(m.content.split()) == 300 and m.state == "complete" for m in whole)
    history.close()
    record_property("kills", 2)
    record_property("pieces_written", last + 1)
    record_property("pieces_lost", max(0, missing))


async def test_words_wait_in_memory_while_the_disk_is_full(history: History, path: Path) -> None:
    loop = asyncio.get_running_loop()
    told: list[str] = []
    chat = history.create_conversation()
    row = history.append(chat.id, None, "assistant", "", state="streaming")
    answer = SavedAnswer(
        history,
        row,
        on_trouble=lambda error: told.append(error.code),
        on_saved_again=lambda: told.append("saved"),
    )
    db = history.database.connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")
    words = "many words " * 5000
    answer.add(words)
    assert not answer.save() and not answer.save()
    done = answer.end("complete", stats=AnswerStats(1))
    assert done.content == words
    assert told == ["history_disk_full"], "said once"
    assert history.message(row.id).content == ""
    assert loop.time() < answer._timer.when(), "it is going to be tried again"  # type: ignore
    db.execute("PRAGMA max_page_count = 1000000")
    assert answer.save() and answer.is_saved
    assert told == ["history_disk_full", "saved"]
    saved = history.message(row.id)
    assert (saved.content, saved.state, saved.stats) == (words, "complete", AnswerStats(1))
    assert answer._timer is None


async def test_a_save_that_failed_is_tried_again_by_itself(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.history.saving.RETRY_S", 0.001)
    monkeypatch.setattr("app.history.saving.SAVE_EVERY_S", 0.001)
    saved = asyncio.Event()
    chat = history.create_conversation()
    row = history.append(chat.id, None, "assistant", "", state="streaming")
    holder = sqlite3.connect(history.path, isolation_level=None)
    history.database.connection.execute("PRAGMA busy_timeout = 1")
    holder.execute("BEGIN IMMEDIATE")

    def trouble(error: GryphonError) -> None:
        assert error.code == "history_busy"
        holder.execute("ROLLBACK")

    answer = SavedAnswer(history, row, on_trouble=trouble, on_saved_again=saved.set)
    answer.add("text", "thought")
    await saved.wait()
    found = history.message(row.id)
    assert (found.content, found.reasoning, found.state) == ("text", "thought", "streaming")
    holder.close()


async def test_a_continued_answer_adds_to_its_words_and_its_figures(history: History) -> None:
    chat = history.create_conversation()
    row = history.append(chat.id, None, "assistant", "", state="streaming")
    first = SavedAnswer(history, row, on_trouble=lambda error: None)
    first.add("one", "thought")
    first.end("complete", finish_reason="length", stats=AnswerStats(10, 0, 5, 0.0, 1.0, 2.0))
    again = SavedAnswer(history, history.continue_answer(row.id), on_trouble=lambda error: None)
    again.add(" two")
    again.add_tool_call(ToolCallPart("c", "look", "{}"))
    again.end("complete", finish_reason="stop", stats=AnswerStats(15, 14, 3, 0.0, 0.5, 1.0, 64))
    found = history.message(row.id)
    assert (found.content, found.reasoning, found.finish_reason) == ("one two", "thought", "stop")
    assert found.stats == AnswerStats(10, 0, 8, 0.0, 1.5, 3.0, 64)
    assert found.tool_calls == (ToolCallPart("c", "look", "{}"),)
