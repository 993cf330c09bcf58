"""Programs that people use, from end to end: aider edits a file in a repository, oterm shows an
answer on its screen. Slow to install, so `scripts/prove --only clients` runs them, not CI."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..server.conftest import SMOL, Server
from .environments import python_with
from .test_clients import SCRIPTS, environment
from .wire import Tape

Record = Callable[[str, object], None]

EDIT = """\
Here is the program with the greeting:

hello.py
```
def greet(name):
    return f"Hello, {name}!"


print(greet("Gryphon"))
```
"""


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.com"]
    return subprocess.run(
        ["git", *identity, *words], cwd=directory, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("streams", [True, False])
def test_aider_edits_a_file_and_commits_it(
    streams: bool, server: Server, tape: Tape, tmp_path: Path, record_property: Record
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "hello.py").write_text("print('hi')\n")
    git(project, "init", "-q")
    git(project, "config", "user.name", "T")
    git(project, "config", "user.email", "t@example.com")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "start")
    # The answer in pieces, then the message of the commit.
    server.board.current.answers = [re.findall(r".{1,7}", EDIT, re.DOTALL), ["feat: greet"]]
    aider = python_with("aider").with_name("aider")
    done = subprocess.run(
        [
            str(aider), "--openai-api-base", f"{tape.url}/v1", "--openai-api-key", "gryphon",
            "--model", f"openai/{SMOL.name}", "--edit-format", "whole", "--yes-always",
            "--no-check-update", "--no-show-model-warnings", "--no-show-release-notes",
            "--no-analytics", "--no-pretty", "--map-tokens", "0", "--no-gitignore",
            "--stream" if streams else "--no-stream",
            "--message", "Greet Gryphon by name.", "hello.py",
        ],
        cwd=project, env=environment(HOME=str(tmp_path)), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    edited = (project / "hello.py").read_text()
    assert edited == EDIT.split("```\n")[1], done.stdout + done.stderr
    assert git(project, "log", "-1", "--format=%s").strip() == "feat: greet"
    assert git(project, "status", "--porcelain", "hello.py") == ""
    assert set(tape.check()) == {"POST /v1/chat/completions"}
    record_property("requests", len(tape.exchanges))
    record_property("files_edited", 1)


def test_oterm_shows_an_answer(
    server: Server, tape: Tape, tmp_path: Path, record_property: Record
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "config.json").write_text('{"splash-screen": false}')
    more = {"OLLAMA_URL": tape.url, "OTERM_DATA_DIR": str(data), "HOME": str(tmp_path)}
    words = [str(python_with("oterm")), "-P", str(SCRIPTS / "oterm_pilot.py"), SMOL.name]
    done = subprocess.run(
        words, env=environment(**more), capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(map(str, tape.exchanges))
    routes = tape.check()
    # It finds models by Ollama's dialect and chats in OpenAI's.
    assert {"GET /api/tags", "POST /api/show", "POST /v1/chat/completions"} <= set(routes)
    record_property("requests", len(tape.exchanges))
