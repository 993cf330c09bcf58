"""The history file against real SQLite."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import GryphonError
from app.history.migrations import MIGRATIONS
from app.history.store import History


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    history = History(path)
    yield history
    history.close()


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
    done = history.finish(answer.id, "Partial", "failed", error="It broke.", stats={"n": 1})
    assert (done.content, done.state, done.error, done.stats, done.model) == (
        "Partial",
        "failed",
        "It broke.",
        {"n": 1},
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


def test_migrates_an_empty_file_and_opens_it_again(path: Path) -> None:
    sqlite3.connect(path).close()
    history = History(path)
    chat = history.create_conversation()
    history.close()
    again = History(path)
    assert again.latest() == chat
    again.close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_a_failing_migration_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE half (id)")
        raise sqlite3.OperationalError("disk I/O error")

    History(path).close()
    monkeypatch.setattr("app.history.migrations.MIGRATIONS", [*MIGRATIONS, half])
    with pytest.raises(GryphonError, match="disk I/O error"):
        History(path)
    monkeypatch.undo()
    History(path).close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == []
    db.close()


def test_a_newer_schema_is_refused_and_kept(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(GryphonError) as caught:
        History(path)
    assert caught.value.code == "history_too_new"
    assert str(path) in caught.value.message
    assert path.exists()


def test_a_damaged_file_is_refused_and_left_alone(path: Path) -> None:
    garbage = b"this is not a database, but it is somebody's file" * 100
    path.write_bytes(garbage)
    with pytest.raises(GryphonError) as caught:
        History(path)
    assert caught.value.code == "history_unreadable"
    assert str(path) in caught.value.message
    assert path.read_bytes() == garbage


def test_damage_found_later_is_one_sentence_too(path: Path) -> None:
    history = History(path)
    chat = history.create_conversation()
    for index in range(200):
        history.append(chat.id, None, "user", f"{index}" * 500)
    history.close()
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 20] = b"\xff" * (4096 * 17)
    path.write_bytes(content)
    damaged = History(path)
    try:
        with pytest.raises(GryphonError) as caught:
            damaged.delete_conversation(chat.id)
        assert caught.value.code == "history_unreadable"
    finally:
        damaged.close()


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
    history._db.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(GryphonError) as caught:
        history.append(chat.id, None, "user", "hello")
    assert caught.value.code == "history_busy"
    holder.execute("ROLLBACK")
    holder.close()
    history.append(chat.id, None, "user", "hello")


_WRITER = """
import sys
from pathlib import Path
from app.history.store import History
history = History(Path(sys.argv[1]))
chat = history.create_conversation()
question = history.append(chat.id, None, "user", "Count.")
answer = history.append(chat.id, question.id, "assistant", "", model="m", state="streaming")
text = ""
for number in range(1_000_000):
    text = f"{text[-20_000:]} {number}"
    history.update_text(answer.id, text)
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 57, 400])
def test_kill_9_loses_at_most_the_flush_in_progress(path: Path, after: int) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(after):
        writer.stdout.readline()

    rival = History(path)
    chat = rival.latest()
    assert chat is not None
    assert not rival.claim(chat.id), "a conversation that is being written is somebody's"
    assert rival.path_to_leaf(chat.id)[-1].state == "streaming"
    rival.close()

    writer.kill()
    seen = [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    writer.stdout.close()

    history = History(path)
    assert history._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert history.claim(chat.id)
    question, answer = history.path_to_leaf(chat.id)
    history.close()
    assert question.content == "Count."
    assert answer.state == "interrupted"
    last_saved = int(answer.content.split()[-1])
    last_reported = seen[-1] if seen else after - 1
    assert last_saved in (last_reported, last_reported + 1)


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
