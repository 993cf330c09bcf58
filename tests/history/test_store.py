"""The history file against real SQLite."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.protocol import Sampling
from app.errors import GryphonError
from app.history.forgetting import forget_deleted
from app.history.records import AnswerStats, Attachment, Parameters
from app.history.search import search
from app.history.store import History

from ..fakes import FakeEngine


def test_path_to_leaf_follows_the_active_branch(history: History) -> None:
    chat = history.create_conversation()
    question = history.append(chat.id, None, "user", "Why?")
    history.append(chat.id, question.id, "assistant", "First try")
    retry = history.append(chat.id, question.id, "assistant", "Second try")
    assert [m.content for m in history.path_to_leaf(chat.id)] == ["Why?", "Second try"]
    history.append(chat.id, retry.id, "user", "And?")
    assert [m.content for m in history.path_to_leaf(chat.id)] == ["Why?", "Second try", "And?"]


def test_streamed_text_is_saved_as_it_comes_and_finished_with_stats(history: History) -> None:
    chat = history.create_conversation()
    answer = history.append(chat.id, None, "assistant", "", model="m", state="streaming")
    history.update_text(answer.id, "Par")
    (saved,) = history.path_to_leaf(chat.id)
    assert (saved.content, saved.state) == ("Par", "streaming")
    done = history.finish(answer.id, "Partial", "failed", error="It broke.", stats=AnswerStats(7))
    assert (done.content, done.state, done.error, done.stats, done.model) == (
        "Partial",
        "failed",
        "It broke.",
        AnswerStats(prompt_tokens=7),
        "m",
    )
    history.update_text(answer.id, "late")
    assert history.path_to_leaf(chat.id) == [done]


def test_title_is_the_first_line_of_the_first_user_message(history: History) -> None:
    chat = history.create_conversation()
    first = history.append(chat.id, None, "user", "\n  Tell me about the sea\nplease")
    history.append(chat.id, first.id, "user", "Other")
    latest = history.latest()
    assert latest is not None and latest.title == "Tell me about the sea"
    other = history.create_conversation()
    history.append(other.id, None, "user", "x" * 100)
    latest = history.latest()
    assert latest is not None and latest.title == "x" * 59 + "…"


def test_latest_is_the_one_used_last(history: History) -> None:
    first, second = history.create_conversation(), history.create_conversation()
    assert [c.id for c in history.conversations()] == [second.id, first.id]
    history.append(first.id, None, "user", "again")
    assert [c.id for c in history.conversations()] == [first.id, second.id]


def test_draft_lasts_until_it_is_sent(history: History) -> None:
    chat = history.create_conversation()
    history.save_draft(chat.id, "half a thou")
    assert history.conversations()[0].draft == "half a thou"
    history.append(chat.id, None, "assistant", "unrelated")
    assert history.conversations()[0].draft == "half a thou"
    history.append(chat.id, None, "user", "half a thought")
    assert history.conversations()[0].draft == ""


def test_delete_takes_the_messages_with_it(history: History, path: Path) -> None:
    chat = history.create_conversation()
    history.append(chat.id, None, "user", "secret")
    history.delete_conversation(chat.id)
    assert history.latest() is None
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM message").fetchone() == (0,)
    db.close()


def test_files_are_private_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        history = History(path)
        history.create_conversation()
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("history*")}
    history.close()
    assert modes == dict.fromkeys(
        ["history.sqlite3", "history.sqlite3-wal", "history.sqlite3-shm", "history.sqlite3-open"],
        0o600,
    )


def test_a_readable_file_is_made_private(path: Path) -> None:
    History(path).close()
    path.chmod(0o644)
    History(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_file_is_set_aside_whole_and_a_new_one_begun(path: Path) -> None:
    garbage = b"this is not a database, but it is somebody's file" * 100
    path.write_bytes(garbage)
    history = History(path)
    history.create_conversation()
    (aside,) = path.parent.glob("history.sqlite3.damaged-*")
    assert aside.read_bytes() == garbage
    assert str(aside) in history.notice
    history.close()
    again = History(path)
    assert again.notice == "" and len(again.conversations()) == 1
    again.close()


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE bookmarks (url)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(GryphonError) as caught:
        History(path)
    assert caught.value.code == "history_unreadable" and str(path) in caught.value.message
    db = sqlite3.connect(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]
    db.close()
    assert len(path.read_bytes()) == len(before)


def damage(path: Path, table: str) -> None:
    """Overwrite the first page below the root of a table."""
    db = sqlite3.connect(path)
    query = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY pageno"
    pages = [page for (page,) in db.execute(query, (table,))]
    db.close()
    content = bytearray(path.read_bytes())
    for page in pages[1:-1]:
        content[4096 * (page - 1) : 4096 * page] = b"\xff" * 4096
    path.write_bytes(content)


@pytest.fixture
def long_chat(path: Path) -> int:
    history = History(path)
    chat = history.create_conversation()
    parent = None
    for index in range(200):
        parent = history.append(chat.id, parent, "user", f"word{index} " * 50).id
    history.close()
    return chat.id


def test_damage_found_later_is_one_sentence_and_the_next_start_sets_the_file_aside(
    path: Path, long_chat: int
) -> None:
    damage(path, "message")
    damaged = History(path)
    with pytest.raises(GryphonError) as caught:
        damaged.path_to_leaf(long_chat)
    assert caught.value.code == "history_unreadable"
    assert str(path) in caught.value.message and "Nothing was removed" in caught.value.message

    elsewhere = subprocess.run(
        [sys.executable, "-c", _OPENER, str(path)], capture_output=True, text=True
    )
    assert "open in another Gryphon" in elsewhere.stderr, "it is somebody's, damaged or not"
    damaged.close()

    anew = History(path)
    (aside,) = path.parent.glob("history.sqlite3.damaged-*")
    assert str(aside) in anew.notice and "integrity_check" in anew.notice
    assert anew.conversations() == []
    anew.close()
    again = History(path)
    assert again.notice == ""
    again.close()


_OPENER = """
import sys
from pathlib import Path
from app.history.store import History
History(Path(sys.argv[1]))
"""


def test_a_damaged_index_of_words_is_made_again(path: Path, long_chat: int) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE message_words_data SET block = x'ffffffff' WHERE id > 10")
    db.commit()
    db.close()
    damaged = History(path)
    with pytest.raises(GryphonError) as caught:
        for index in range(200):
            search(damaged, f"word{index}")
    assert caught.value.code == "history_unreadable"
    damaged.close()
    whole = History(path)
    assert whole.notice == ""
    assert len(whole.path_to_leaf(long_chat)) == 200
    assert all(search(whole, f"word{index}") for index in range(200))
    whole.close()


@pytest.mark.parametrize("kind", ["is_a_directory", "no_such_directory", "below_a_file"])
def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind / "history.sqlite3"
    if kind == "is_a_directory":
        path.mkdir(parents=True)
    if kind == "below_a_file":
        path.parent.write_text("")
    with pytest.raises(GryphonError) as caught:
        History(path)
    assert caught.value.code == "history_not_writable"
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_two_gryphons_write_to_one_file(history: History, path: Path) -> None:
    other = History(path)
    mine, theirs = history.create_conversation(), other.create_conversation()
    for index in range(20):
        history.append(mine.id, None, "user", f"mine {index}")
        other.append(theirs.id, None, "user", f"theirs {index}")
    other.close()
    assert {c.title for c in history.conversations()} == {"mine 0", "theirs 0"}


def test_a_locked_file_is_one_sentence(
    history: History, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = history.create_conversation()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    history.database.connection.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(GryphonError) as caught:
        history.append(chat.id, None, "user", "hello")
    assert caught.value.code == "history_busy"
    holder.execute("ROLLBACK")
    holder.close()
    history.append(chat.id, None, "user", "hello")


def test_a_released_conversation_can_be_claimed_elsewhere(history: History, path: Path) -> None:
    chat = history.create_conversation()
    attempt = (
        "import sys; from pathlib import Path; from app.history.store import History\n"
        "history = History(Path(sys.argv[1])); print(history.claim(int(sys.argv[2])))"
    )

    def claimed_elsewhere() -> str:
        return subprocess.run(
            [sys.executable, "-c", attempt, str(path), str(chat.id)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert claimed_elsewhere() == "False"
    history.release(chat.id)
    assert claimed_elsewhere() == "True"


def test_two_histories_in_one_process_keep_their_claims_apart(history: History, path: Path) -> None:
    chat = history.create_conversation()
    other = History(path)
    assert not other.claim(chat.id)
    with pytest.raises(GryphonError) as caught:
        other.delete_conversation(chat.id)
    assert caught.value.code == "chat_in_use"
    other.close()
    attempt = _OPENER + f"print(History(Path(sys.argv[1])).claim({chat.id}))"
    done = subprocess.run(
        [sys.executable, "-c", attempt, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n", "closing one must not drop the claims of the other"


def test_what_belongs_to_a_chat_is_kept_with_it(history: History, path: Path) -> None:
    chat = history.create_conversation(folder=" work / reports ", model="tiny")
    parameters = Parameters(
        sampling=Sampling(temperature=0.5, logit_bias={7: -1.5}), max_tokens=9, stop=["\n"]
    )
    history.set_parameters(chat.id, parameters)
    history.set_system_prompt(chat.id, "Be brief.")
    history.set_model(chat.id, "other", "lora")
    history.pin(chat.id)
    other = History(path)
    found = other.conversation(chat.id)
    other.close()
    assert found.folder == "work/reports" and found.pinned
    assert (found.model, found.adapter, found.system_prompt) == ("other", "lora", "Be brief.")
    assert found.parameters == parameters
    with pytest.raises(GryphonError, match="temperature"):
        history.set_parameters(chat.id, Parameters(sampling=Sampling(temperature=3)))
    with pytest.raises(GryphonError, match="no chat 99"):
        history.pin(99)


def test_folders_are_there_as_long_as_chats_are_in_them(history: History) -> None:
    ids = [history.create_conversation(folder=name).id for name in ("a", "a/b", "ab", "")]
    assert [(f.name, f.conversations) for f in history.folders()] == [
        ("a", 1),
        ("a/b", 1),
        ("ab", 1),
    ]
    history.rename_folder("a", "c")
    assert [history.conversation(id).folder for id in ids] == ["c", "c/b", "ab", ""]
    history.rename_folder("c", "")
    assert [history.conversation(id).folder for id in ids] == ["", "b", "ab", ""]
    assert [chat.id for chat in history.conversations(folder="ab")] == [ids[2]]


def test_pinned_chats_come_first_in_a_list_for_people(history: History) -> None:
    first, second, third = (history.create_conversation().id for _ in range(3))
    history.pin(first)
    assert [c.id for c in history.conversations(pinned_first=True)] == [first, third, second]
    assert [c.id for c in history.conversations(limit=2, offset=1)] == [second, first]
    history.pin(first, pinned=False)
    assert [c.id for c in history.conversations(pinned_first=True)] == [third, second, first]


def test_a_models_title_gives_way_to_a_persons(history: History) -> None:
    chat = history.create_conversation()
    question = history.append(chat.id, None, "user", "What is salt?")
    assert history.conversation(chat.id).titled_by == "first_words"
    assert history.rename(chat.id, "Salt\nof the sea", by="model")
    assert history.conversation(chat.id).title == "Salt of the sea"
    assert history.rename(chat.id, "Mine")
    assert not history.rename(chat.id, "About salt", by="model")
    history.append(chat.id, question.id, "user", "More")
    found = history.conversation(chat.id)
    assert (found.title, found.titled_by, found.messages, found.turns) == ("Mine", "person", 2, 2)
    assert history.rename(chat.id, "")
    assert history.rename(chat.id, "About salt", by="model")


def test_drafts_have_attachments_and_prompts_are_remembered(history: History) -> None:
    chat = history.create_conversation()
    notes = Attachment("notes.txt", "text " * 1000)
    history.save_draft(chat.id, "About this:", [notes])
    history.save_draft(chat.id, "About these:")
    assert history.draft_attachments(chat.id) == [notes]
    asked = history.append(
        chat.id, None, "user", "About these:", attachments=[notes, Attachment("copy", notes.text)]
    )
    assert history.draft_attachments(chat.id) == []
    assert [one.name for one in history.message(asked.id).attachments] == ["notes.txt", "copy"]
    edited = history.edit(asked.id, "About it:")
    assert edited.attachments == asked.attachments and edited.parent is None
    history.remember_prompt(chat.id, "/help")
    history.remember_prompt(chat.id, "/help")
    history.append(chat.id, None, "user", "About these:")
    history.append(chat.id, None, "assistant", "An answer")
    assert history.prompts(chat.id) == ["About these:", "/help", "About it:"]
    assert history.prompts(chat.id, 1) == ["About these:"]
    assert [text for text, _ in history.commands(chat.id)] == ["/help", "/help"]

    def texts() -> int:
        query = "SELECT count(*) FROM attachment_text"
        return int(history.database.connection.execute(query).fetchone()[0])

    assert texts() == 1, "a text is kept once however often it is attached"
    history.delete_message(asked.id)
    assert texts() == 1
    history.delete_message(edited.id)
    assert texts() == 0


def test_any_text_can_be_stored(history: History) -> None:
    chat = history.create_conversation()
    texts = ["\ud83d\ude42 and \ud83d alone", "zero \0 byte", "\U0010ffff", ""]
    kept = [history.append(chat.id, None, "user", text).content for text in texts]
    assert kept == ["🙂 and \ufffd alone", "zero \0 byte", "\U0010ffff", ""]
    history.rename(chat.id, "\udc00")
    history.save_draft(chat.id, "\udc00")
    assert history.conversation(chat.id).draft == "\ufffd"


def test_nothing_of_what_was_deleted_stays_in_the_file(history: History, path: Path) -> None:
    chat = history.create_conversation()
    asked = history.append(
        chat.id, None, "user", "swordfish", attachments=[Attachment("n", "trout")]
    )
    history.append(chat.id, asked.id, "assistant", "a swordfish")
    other = history.create_conversation()
    deleted = history.append(other.id, None, "user", "haddock")
    history.append(other.id, None, "user", "plaice")
    history.delete_conversation(chat.id)
    history.delete_message(deleted.id)
    history.close()
    content = b"".join(file.read_bytes() for file in path.parent.glob("history*"))
    for word in (b"swordfish", b"trout", b"haddock"):
        assert word not in content
    assert b"plaice" in content


async def test_deleted_chats_are_forgotten_by_the_engine_even_after_a_kill(
    history: History, path: Path
) -> None:
    chat = history.create_conversation()
    history.append(chat.id, None, "user", "secret")
    empty = history.create_conversation()
    history.delete_conversation(chat.id)
    history.delete_conversation(empty.id)
    assert history.to_forget() == [chat.engine_chat], "of an empty chat the engine knows nothing"

    engine = FakeEngine()

    async def fail(name: str) -> None:
        raise GryphonError("not_forgotten", "The file cannot be removed.")

    after_a_kill = History(path)
    with pytest.raises(GryphonError):
        await forget_deleted(after_a_kill, fail)
    await forget_deleted(after_a_kill, engine.forget_chat)
    assert engine.forgotten == [chat.engine_chat]
    assert after_a_kill.to_forget() == []
    after_a_kill.close()
