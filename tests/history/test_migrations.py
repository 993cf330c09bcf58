"""Histories of every earlier version open with all that is in them; the version before stays."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from app.engine.protocol import ToolCallPart
from app.errors import GryphonError
from app.history.migrations import BACKUPS_KEPT_S, MIGRATIONS, backup_path
from app.history.records import AnswerStats
from app.history.search import search
from app.history.store import History

WRITTEN = Path(__file__).parent / "written_by_earlier"
VERSIONS = range(1, len(MIGRATIONS))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_history_of_an_earlier_version_is_all_there(path: Path, version: int) -> None:
    shutil.copy(WRITTEN / f"version-{version}.sqlite3", path)
    path.chmod(0o600)
    history = History(path)
    assert history.notice == ""
    other, sea = history.conversations()
    assert (other.draft, other.title, other.titled_by) == ("half a thought", "", "nobody")
    assert (sea.title, sea.titled_by) == ("Why is the séa salty?", "first_words")
    assert len({sea.uid, other.uid, ""}) == 3
    assert (sea.messages, sea.turns) == (5, 4)
    assert history.claim(sea.id)
    why, first, more, last = history.path_to_leaf(sea.id)
    assert [m.depth for m in (why, first, more, last)] == [1, 2, 3, 4]
    assert (first.content, first.finish_reason) == ("Rivers bring", "length")
    assert first.stats == AnswerStats(9, 5, 4, 0.25, 0.5, 1.5, 8192)
    assert first.stats.decode_tps == 2.0
    assert first.reasoning == ("" if version == 1 else "Because 漢字 …")
    assert (last.content, last.state) == ("From the ro", "interrupted")
    assert history.choose(why.id) == last, "the path is what was shown, not what is newest"
    second = history.siblings(first.id)[1]
    assert history.choose(second).error == "The engine stopped."
    assert history.choose(first.id) == last, "what was shown below is shown again"
    assert history.prompts(sea.id) == ["盐从哪里来?", "Why is the séa salty?\nI wonder"]
    assert [hit.message for hit in search(history, "SEA salty")] == [None, why.id]
    assert [hit.message for hit in search(history, "哪里")] == [more.id]
    assert history.to_forget() == ["history-1", "history-2"], "the engine knew them so"
    assert history.append(sea.id, last.id, "tool", "x", tool_call_id="c").id == 6
    history.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_before_is_kept_for_a_while(path: Path, version: int) -> None:
    shutil.copy(WRITTEN / f"version-{version}.sqlite3", path)
    History(path).close()
    backup = backup_path(path, version)
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    db = sqlite3.connect(backup)
    assert db.execute("PRAGMA user_version").fetchone() == (version,)
    assert db.execute("SELECT count(*) FROM message").fetchone() == (5,)
    db.close()
    History(path).close()
    assert backup.exists()
    long_ago = time.time() - BACKUPS_KEPT_S - 60
    os.utime(backup, (long_ago, long_ago))
    History(path).close()
    assert not backup.exists()


def test_every_migrated_history_has_the_schema_of_a_new_one(path: Path, tmp_path: Path) -> None:
    def schema(of: Path) -> list[tuple[str, str]]:
        History(of).close()
        db = sqlite3.connect(of)
        rows = db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        db.close()
        return rows

    new = schema(path)
    for version in VERSIONS:
        copy = tmp_path / f"{version}.sqlite3"
        shutil.copy(WRITTEN / f"version-{version}.sqlite3", copy)
        assert schema(copy) == new


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


def test_without_a_copy_nothing_is_migrated(path: Path) -> None:
    shutil.copy(WRITTEN / "version-2.sqlite3", path)
    backup_path(path, 2).mkdir()
    (backup_path(path, 2) / "in the way").touch()
    with pytest.raises(GryphonError):
        History(path)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    db.close()
    assert not list(path.parent.glob("*.part"))


def test_a_newer_schema_is_refused_and_kept(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(GryphonError) as caught:
        History(path)
    assert caught.value.code == "history_too_new"
    assert str(path) in caught.value.message
    assert path.exists()


def test_an_empty_file_is_a_new_history(path: Path) -> None:
    path.touch()
    history = History(path)
    chat = history.create_conversation()
    answer = history.append(chat.id, None, "assistant", "", state="streaming")
    calls = (ToolCallPart("1", "look", "{}"),)
    done = history.finish(answer.id, "", "complete", tool_calls=calls, finish_reason="tool_calls")
    assert history.path_to_leaf(chat.id) == [done] and done.tool_calls == calls
    history.close()
    assert not list(path.parent.glob("*-version-*"))
