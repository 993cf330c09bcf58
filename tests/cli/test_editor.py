"""`gryphon editor`: what it prints on a machine, and what it does to files that people wrote."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import main
from app.cli.config_text import jsonc
from app.cli.editors import EDITORS, configure
from app.cli.editors.configuration import Configuration, Endpoint, Places, ServedModel, Setup
from app.server.announcement import announced, running_endpoints
from app.server.serving import ServerOptions, ServerThread

from ..fakes import FakeEngine
from ..tiny_models import OPEN_LLAMA, RECURRENT_GEMMA, write_model

GRYPHON = str(Path(sys.executable).with_name("gryphon"))
GOLDEN = Path(__file__).parent.parent / "golden" / "editors"
KEY = "s3cret-key"


@pytest.fixture
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    path = tmp_path / "person"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    for name in ("XDG_CONFIG_HOME", "CODEX_HOME", "CLAUDE_CONFIG_DIR", "GRYPHON_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def models(home: Path) -> Path:
    """Two models: "griffin" without a limit, which is the default, and "tiny"."""
    directory = home / "data" / "models"
    write_model(directory / "tiny", OPEN_LLAMA)
    (directory / "tiny" / "chat_template.jinja").write_text("{{ messages }}{{ tools }}")
    griffin = write_model(directory / "griffin", RECURRENT_GEMMA)
    for file in (directory / "tiny").iterdir():
        os.utime(file, (0, 0))
    return griffin


Run = Callable[..., str]


@pytest.fixture
def run(person: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `gryphon editor WORDS`; returns standard output, or the error where it fails."""

    def run(*words: str, status: int = 0) -> str:
        code = main(["editor", *words])
        output = capsys.readouterr()
        assert code == status, output
        assert (output.err == "") == (status == 0)
        return output.err if status else output.out

    return run


@pytest.mark.parametrize("name", EDITORS)
def test_prints_what_the_editor_needs(name: str, run: Run, person: Path) -> None:
    """Delete a golden file to have it written anew."""
    printed = run(name).replace(str(person), "~").replace("Library/Application Support", ".config")
    golden = GOLDEN / f"{name}.txt"
    if not golden.exists():
        golden.write_text(printed)
        pytest.fail(f"{golden} was missing and is written now; look at it and run again")
    assert printed == golden.read_text()


@pytest.mark.parametrize("name", EDITORS)
def test_what_is_printed_is_what_is_written_where_there_is_nothing(
    name: str, run: Run, person: Path
) -> None:
    told = json.loads(run(name, "--json"))
    if not told["files"]:
        assert "no other program can write" in run(name, "--write", "--yes", status=1)
        return
    run(name, "--write", "--yes")
    for file in told["files"]:
        path = Path(file["path"])
        assert path.read_text() == file["content"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.is_relative_to(person)
    assert "Nothing to change" in run(name, "--write", "--yes")


SETTINGS = {
    "zed": (
        ".config/zed/settings.json",
        '// my Zed\n{\n  "theme": "Ayu", // nice\n  "language_models": {"openai": {}},\n}\n',
        lambda text: jsonc.read(text)["language_models"]["openai_compatible"]["gryphon"]["api_url"],
    ),
    "continue": (
        ".continue/config.yaml",
        "# my assistant\nname: Mine\nversion: 2.0.0\nschema: v1\n\nmodels:\n  # at work\n"
        "  - name: GPT\n    provider: openai\n    model: gpt\n    apiKey: sk-very-secret\n\n"
        "rules:\n  - Be brief. # always\n",
        lambda text: yaml.safe_load(text)["models"][1]["apiBase"],
    ),
    "vscode": (
        ".config/Code/User/chatLanguageModels.json",
        '[\n\t{\n\t\t"name": "Ollama", // local\n\t\t"vendor": "ollama"\n\t}\n]\n',
        lambda text: jsonc.read(text)[1]["models"][0]["url"].removesuffix("/chat/completions"),
    ),
    "aider": (
        ".aider.conf.yml",
        "# mine\ndark-mode: true   # always\nmodel: gpt-4o\nread: [CONVENTIONS.md]\n",
        lambda text: yaml.safe_load(text)["openai-api-base"],
    ),
    "llama-vim": (
        ".config/nvim/init.lua",
        "-- mine\nvim.o.number = true\nrequire('lazy').setup('plugins')\n",
        lambda text: text.partition('endpoint_inst = "')[2].partition("/chat")[0],
    ),
    "claude-code": (
        ".claude/settings.json",
        '{\n    "permissions": {"allow": ["Bash(ls:*)"]},\n    "env": {"EDITOR": "vi"}\n}\n',
        lambda text: jsonc.read(text)["env"]["ANTHROPIC_BASE_URL"] + "/v1",
    ),
    "codex": (
        ".codex/config.toml",
        '# mine\nmodel = "gpt"\n\n[mcp_servers.docs] # docs\ncommand = "docs"\n',
        lambda text: tomllib.loads(text)["model_providers"]["gryphon"]["base_url"],
    ),
    "opencode": (
        ".config/opencode/opencode.jsonc",
        '{\n  "theme": "x", /* t */\n  "provider": {"work": {"npm": "@ai-sdk/openai"}},\n}\n',
        lambda text: jsonc.read(text)["provider"]["gryphon"]["options"]["baseURL"],
    ),
}


@pytest.fixture(params=SETTINGS)
def written(request: pytest.FixtureRequest, person: Path) -> tuple[str, Path, str, Any]:
    """An editor with settings that a person wrote: its name, the file, its text, a reader."""
    place, text, read = SETTINGS[request.param]
    path = person / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o640)
    return request.param, path, text, read


def test_merges_into_what_a_person_wrote(written: tuple[str, Path, str, Any], run: Run) -> None:
    name, path, text, read = written
    shown = run(name, "--write", "--yes")
    new = path.read_text()
    assert read(new) == "http://127.0.0.1:11500/v1"
    # Nothing is lost but what is replaced: aider's one model, and an end without a comma.
    kept = new.replace("}}}", "")
    gone = [line for line in text.splitlines() if line.rstrip("},") not in kept]
    assert gone == (["model: gpt-4o"] if name == "aider" else [])
    assert "+" in shown and "sk-very-secret" not in shown
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (backup,) = path.parent.glob(f"{path.name}.before-gryphon-*")
    assert backup.read_text() == text and stat.S_IMODE(backup.stat().st_mode) == 0o640
    assert str(backup) in shown
    assert "Nothing to change" in run(name, "--write", "--yes")
    assert path.read_text() == new and len(list(path.parent.glob("*.before-gryphon-*"))) == 1
    # What the person then changes of it stays, and another port takes the place of the first.
    assert "11600" in run(name, "--write", "--yes", "--port", "11600")
    assert read(path.read_text()) == "http://127.0.0.1:11600/v1"


def test_a_link_stays_and_what_it_names_is_changed(
    written: tuple[str, Path, str, Any], run: Run, tmp_path: Path
) -> None:
    name, path, _, read = written
    dotfile = tmp_path / "dotfiles" / "settings"
    dotfile.parent.mkdir()
    path.rename(dotfile)
    path.symlink_to(dotfile)
    run(name, "--write", "--yes")
    assert path.is_symlink() and read(dotfile.read_text()) == "http://127.0.0.1:11500/v1"
    assert len(list(dotfile.parent.iterdir())) == 2


def identity(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def hostile_broken(path: Path) -> str:
    path.write_bytes(b"{ this: is [ not any format\n= \x00\n")
    return "left as it is"


def hostile_bytes(path: Path) -> str:
    path.write_bytes(b"\xff\xfe\x00broken")
    return "not UTF-8"


def hostile_huge(path: Path) -> str:
    path.write_bytes(b" " * 4_000_001)
    return "longer than"


def hostile_directory(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "left as it is"


def hostile_pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "not a file"


def hostile_circle(path: Path) -> str:
    path.unlink()
    path.symlink_to(path)
    return "left as it is"


@pytest.mark.parametrize(
    "make",
    [
        hostile_broken,
        hostile_bytes,
        hostile_huge,
        hostile_directory,
        hostile_pipe,
        hostile_circle,
    ],
)
@pytest.mark.parametrize("name", ["zed", "continue", "codex"])
def test_a_file_that_cannot_be_merged_into_is_left_alone(
    name: str, make: Callable[[Path], str], run: Run, person: Path
) -> None:
    path = person / SETTINGS[name][0]
    path.parent.mkdir(parents=True)
    path.touch()
    said = make(path)
    before = identity(path)
    error = run(name, "--write", "--yes", status=1)
    assert said in error and str(path) in error
    assert identity(path) == before and list(path.parent.iterdir()) == [path]


def test_two_files_are_both_looked_at_before_one_is_written(run: Run, person: Path) -> None:
    (person / ".aider.model.metadata.json").write_text("{")
    assert "metadata" in run("aider", "--write", "--yes", status=1)
    assert not (person / ".aider.conf.yml").exists()


def test_a_file_that_changes_meanwhile_is_not_overwritten(
    person: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = person / ".config" / "zed" / "settings.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    monkeypatch.setattr("app.cli.editor.can_ask", lambda: True)

    def confirm(question: str, *, default: bool) -> bool:
        path.write_text('{"a": 1}')  # Zed saves, while its user reads what would change
        return True

    monkeypatch.setattr("app.cli.editor.confirm", confirm)
    assert main(["editor", "zed", "--write"]) == 1
    assert "changed by somebody else" in capsys.readouterr().err
    assert path.read_text() == '{"a": 1}'


@pytest.mark.parametrize(("answer", "writes"), [(b"y\n", True), (b"\n", False), (b"n\n", False)])
def test_asks_at_a_terminal(answer: bytes, writes: bool, person: Path, models: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [GRYPHON, "editor", "zed", "--write"], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE
    )
    os.close(theirs)
    asked = b""
    while b"[y/N]" not in asked:
        asked += os.read(ours, 1000)
    os.write(ours, answer)
    shown, _ = process.communicate(timeout=60)
    os.close(ours)
    assert b'+  "language_models": {' in shown
    assert (person / ".config" / "zed" / "settings.json").exists() == writes
    assert (process.returncode == 0) == writes


def test_where_nobody_can_be_asked_nothing_is_written(person: Path, models: Path) -> None:
    done = subprocess.run(
        [GRYPHON, "editor", "zed", "--write"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "--yes" in done.stderr
    assert list(person.iterdir()) == []


@pytest.mark.parametrize("name", EDITORS)
def test_the_key_is_told_only_when_asked_for(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch, person: Path
) -> None:
    monkeypatch.setenv("GRYPHON_API_KEY", KEY)
    told = run(name)
    assert "needs its API key" in told and KEY not in told
    assert KEY not in run(name, "--json")
    assert KEY in run(name, "--show-key")
    if name != "jetbrains":
        assert KEY not in run(name, "--write", "--yes")
        assert all(KEY not in one.read_text() for one in person.rglob("*") if one.is_file())
        # The keys that a file holds are not shown beside what changes.
        if name != "zed":
            run(name, "--write", "--yes", "--show-key")
            again = run(name, "--write", "--yes", "--show-key", "--port", "11600")
            notes = again.partition("Wrote")[2]
            assert KEY not in again.removesuffix(notes) or name == "llama-vim"


def test_a_key_that_nobody_knows_cannot_be_shown(run: Run) -> None:
    with announced("http://127.0.0.1:11711", has_key=True):
        assert "GRYPHON_API_KEY" in run("zed", "--show-key", status=1)


def test_a_model_can_be_chosen(run: Run) -> None:
    told = json.loads(run("codex", "-m", "tiny", "--json"))
    assert tomllib.loads(told["files"][1]["content"]) == {
        "model": "tiny", "model_provider": "gryphon", "model_context_window": 512,
    }  # fmt: skip
    assert "griffin" not in json.dumps(told)
    assert "No installed model" in run("codex", "-m", "gpt-4", status=1)


def test_without_a_model_says_how_to_get_one(
    person: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["editor", "zed"]) == 1
    assert "gryphon pull" in capsys.readouterr().err


def test_a_newer_configuration_is_not_hidden(run: Run, person: Path) -> None:
    (person / ".continue").mkdir()
    (person / ".continue" / "config.json").write_text("{}")
    assert "Migrate it first" in run("continue", status=1)
    path = person / ".config" / "opencode" / "opencode.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"providers": {}}')
    assert '"providers"' in run("opencode", "--write", "--yes", status=1)
    (person / ".vimrc").write_text("let g:llama_config = {}\n")
    assert "line 1 sets llama_config" in run("llama-vim", "--write", "--yes", status=1)


@pytest.fixture
def server() -> Iterator[ServerThread]:
    thread = ServerThread(FakeEngine, ServerOptions(port=0, api_key=KEY))
    thread.start()
    yield thread
    thread.stop()


def test_the_endpoint_that_runs_is_found(
    person: Path, models: Path, server: ServerThread, run: Run
) -> None:
    told = json.loads(run("opencode", "--json"))
    assert (told["url"], told["running"]) == (server.url, True)
    options = json.loads(told["files"][0]["content"])["provider"]["gryphon"]["options"]
    assert options == {"baseURL": f"{server.url}/v1", "apiKey": "{env:GRYPHON_API_KEY}"}
    other = json.loads(run("opencode", "--json", "--port", "11600"))
    assert (other["url"], other["running"]) == ("http://127.0.0.1:11600", False)
    server.stop()
    assert running_endpoints() == []
    assert json.loads(run("opencode", "--json"))["url"] == "http://127.0.0.1:11500"


def test_an_endpoint_that_was_killed_is_forgotten(home: Path) -> None:
    code = (
        "import os\nfrom app.server.announcement import announced\n"
        "with announced('http://127.0.0.1:9', has_key=False):\n    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = (home / "state" / "endpoints").iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert running_endpoints() == [] and not left.exists()


def test_an_endpoint_without_a_port_is_not_for_editors(home: Path) -> None:
    with announced("unix:/run/gryphon.sock", has_key=False):
        assert running_endpoints() == []


@pytest.mark.parametrize(
    ("url", "called"),
    [("https://0.0.0.0:80", "https://127.0.0.1:80"), ("http://[::1]:80", "http://[::1]:80")],
)
def test_an_address_that_cannot_be_called_is_not_told(url: str, called: str, run: Run) -> None:
    with announced(url, has_key=False):
        assert json.loads(run("zed", "--json"))["url"] == called


NASTY = "a\"b'c$(id)`\\{}: #"


@pytest.mark.parametrize("name", EDITORS)
def test_names_that_others_chose_are_data_in_every_format(name: str, tmp_path: Path) -> None:
    places = Places(*[tmp_path / one for one in ("home", "xdg", "config", "codex", "claude")])
    endpoint = Endpoint("http://127.0.0.1:1", is_running=True, needs_key=True, shown_key=NASTY)
    made: Configuration = configure(name, Setup(endpoint, [ServedModel(NASTY, 9, True)], places))
    for file in made.files:
        text = file.edited("")
        assert file.edited(text) == text
        if file.path.suffix in (".json", ".yaml", ".yml"):
            assert NASTY in repr_of(yaml.safe_load(text) if "y" in file.path.suffix else
                                    json.loads(text))  # fmt: skip
    for command in made.command:
        words = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True
        )
        assert "uid=" not in words.stdout


def repr_of(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}\n{repr_of(one)}" for key, one in value.items())
    return "\n".join(map(repr_of, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize("name", ["init.vim", "init.lua"])
def test_the_block_is_a_script_that_the_editor_can_run(name: str, run: Run, person: Path) -> None:
    path = person / ".config" / "nvim" / name
    path.parent.mkdir(parents=True)
    path.touch()
    run("llama-vim", "--write", "--yes")
    line = path.read_text().splitlines()[1]
    pattern = "let g:llama_config = { 'endpoint_fim': 'http" if name == "init.vim" else (
        'vim.g.llama_config = { endpoint_fim = "http'
    )  # fmt: skip
    assert line.startswith(pattern) and line.endswith(" }")


def test_places_are_those_of_the_platform(person: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEX_HOME", str(person / "cx"))
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "~/cl")
    places = Places.here()
    assert (places.codex, places.claude) == (person / "cx", person / "cl")
    assert places.xdg_config == person / ".config"
    expected = "Library/Application Support" if sys.platform == "darwin" else ".config"
    assert places.config == person / expected


def test_every_editor_is_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "editors.md").read_text()
    assert [name for name in EDITORS if f"gryphon editor {name}`" not in page] == []
