"""`gryphon chats` as a person types it."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from app import paths
from app.cli import main
from app.history.store import History

from .test_commands import gryphon

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """As `gryphon`, in this process: starting one takes most of a second."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        try:
            status = main(words)
        except SystemExit as usage:
            status = int(usage.code or 0)
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    return run


@pytest.fixture
def chats(home: Path) -> None:
    """Two chats, of which the first was used last and the second is pinned."""
    history = History(paths.history_path())
    salt = history.create_conversation(folder="work")
    sea = history.create_conversation()
    history.append(sea.id, None, "user", "Tell me about the sea")
    asked = history.append(salt.id, None, "user", "Why is the séa salty?")
    history.append(salt.id, asked.id, "assistant", "Rivers\x1b[31m bring salt.", model="tiny")
    history.pin(sea.id)
    history.close()


def test_lists_chats_pinned_first(chats: None, typed: Typed) -> None:
    for words in (["chats"], ["chats", "list"]):
        lines = typed(*words).stdout.splitlines()
        assert lines[0].split() == ["CHAT", "TITLE", "MESSAGES", "FOLDER", "MODEL", "LAST", "USED"]
        assert lines[1].startswith("2     * Tell me about the sea  1")
        assert lines[2].startswith("1     Why is the séa salty?    2         work")
    for words in (["chats", "--json"], ["chats", "list", "--json"]):
        found = json.loads(typed(*words).stdout)
        assert [(c["chat"], c["messages"], c["pinned"]) for c in found] == [
            (2, 1, True),
            (1, 2, False),
        ]
    assert len(typed("chats", "list", "--folder", "work").stdout.splitlines()) == 2
    assert len(typed("chats", "list", "--limit", "1").stdout.splitlines()) == 2


def test_an_empty_history_is_no_error(home: Path, typed: Typed) -> None:
    assert typed("chats").stdout == "No chats yet. `gryphon` opens one.\n"
    assert json.loads(typed("chats", "--json").stdout) == []
    assert typed("chats", "search", "x").stdout == "Nothing found.\n"


def test_search_marks_what_it_finds(chats: None, typed: Typed) -> None:
    out = typed("chats", "search", "SALT", "bring").stdout
    assert "1  Why is the séa salty? · assistant," in out
    assert "[bring] [salt]." in out and "\x1b" not in out
    hits = json.loads(typed("chats", "search", "sea", "--json").stdout)
    assert {(hit["conversation"], hit["message"]) for hit in hits} == {
        (1, None), (2, None), (1, 2), (2, 1),
    }  # fmt: skip
    assert typed("chats", "search", '"', "AND").returncode == 0


def test_shows_exports_and_imports(chats: None, typed: Typed, tmp_path: Path) -> None:
    shown = typed("chats", "show", "1").stdout
    assert shown.startswith("# Why is the séa salty?\n") and "## tiny\n\nRivers" in shown
    assert json.loads(typed("chats", "show", "1", "--json").stdout)["folder"] == "work"
    file = tmp_path / "all.json"
    assert typed("chats", "export", "-o", str(file)).stdout == f"2 chats in {file}.\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = typed("chats", "export", "-o", str(file))
    assert again.returncode == 1 and "is there already" in again.stderr
    assert typed("chats", "export", "1", "--format", "markdown").stdout == shown
    assert typed("chats", "import", str(file)).stdout == (
        "Imported 0 chats.\n2 chats had been imported before.\n"
    )
    assert typed("chats", "rm", "1", "--yes").returncode == 0
    assert json.loads(typed("chats", "import", str(file), "--json").stdout) == {
        "conversations": [3],
        "already_here": 1,
        "left_out": 0,
    }
    assert "## tiny\n\nRivers" in typed("chats", "show", "3").stdout


def test_what_cannot_be_is_one_sentence(chats: None, typed: Typed, tmp_path: Path) -> None:
    for words, sentence in (
        (["show", "9"], "There is no chat 9. `gryphon chats` lists them."),
        (["export", "9", "-o", str(tmp_path / "x")], "There is no chat 9."),
        (["export", "-o", str(tmp_path / "no" / "x")], "cannot be written"),
        (["import", str(tmp_path / "none")], "cannot be read"),
        (["rm", "1"], "needs --yes"),
        (["rm", "1", "9", "-y"], "There is no chat 9."),
        (["search", "x", "--limit", "0"], "--limit must be at least 1"),
    ):
        done = typed("chats", *words)
        assert done.returncode in (1, 2) and sentence in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert len(json.loads(typed("chats", "--json").stdout)) == 2


def test_rm_removes_and_leaves_nothing_to_forget(chats: None) -> None:
    done = gryphon("chats", "rm", "1", "2", "-y", "--json")
    assert json.loads(done.stdout) == {"removed": [1, 2]}
    history = History(paths.history_path())
    assert (history.conversations(), history.to_forget()) == ([], [])
    history.close()


def test_a_chat_open_elsewhere_is_not_removed(chats: None, typed: Typed) -> None:
    history = History(paths.history_path())
    assert history.claim(1)
    done = typed("chats", "rm", "1", "-y")
    assert done.returncode == 1 and "open in another Gryphon" in done.stderr
    assert len(history.conversations()) == 2
    history.close()
