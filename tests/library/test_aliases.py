"""The default model and aliases, as a person sets and uses them."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.cli import main
from app.cli.models import model_for
from app.errors import GryphonError
from app.library.installed import find_model
from app.server.serving import ServerOptions, ServerThread

from ..fakes import FakeEngine
from ..hub_server import HubServer
from .model_files import model_files
from .test_adapters import write_adapter

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> SimpleNamespace:
        status = main(words)
        output = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=output.out, stderr=output.err)

    return run


@pytest.fixture
def models(hub: HubServer, home: Path, run: Run) -> Path:
    """org/a of the hub, and "mine" of our own, which is the latest; returns the settings file."""
    hub.add("org/a", model_files())
    assert run("pull", "org/a").status == 0
    write_own(home, "mine")
    return home / "config" / "settings.toml"


def write_own(home: Path, name: str) -> None:
    path = home / "data" / "models" / name
    path.mkdir(parents=True, exist_ok=True)
    for file, data in model_files().items():
        (path / file).write_bytes(data)


def test_use_sets_the_default_and_shows_it(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("use").stdout == "mine is used when no model is named; no default is set.\n"
    done = run("use", "org/a")
    said = f"org/a is used when no model is named (default_model in {models}).\n"
    assert (done.status, done.stdout, done.stderr) == (0, said, "")
    assert models.read_text() == 'default_model = "org/a"\n'
    assert find_model().name == "org/a"
    assert "* org/a" in run("list").stdout and "  mine" in run("list").stdout
    assert [one["default"] for one in json.loads(run("list", "--json").stdout)] == [False, True]
    monkeypatch.setenv("GRYPHON_MODEL", "mine")
    assert find_model().name == "mine"
    assert "(GRYPHON_MODEL)" in run("use").stdout
    assert "GRYPHON_MODEL=mine wins" in run("use", "org/a").stderr
    monkeypatch.delenv("GRYPHON_MODEL")
    assert run("use", "--unset").status == 0 and find_model().name == "mine"
    assert json.loads(run("use", "--json").stdout) == {"default": "mine", "set_in": None}
    for words in (["use", "org/gone"], ["use", "."], ["use", str(models.parent)]):
        assert run(*words).status == 1
    assert run("use", "x", "--unset").status == 2


def test_a_default_that_was_removed_is_a_clear_sentence(models: Path, run: Run) -> None:
    run("use", "org/a")
    removed = run("rm", "org/a", "--yes")
    assert removed.status == 0 and "It is the default model: choose another" in removed.stderr
    with pytest.raises(GryphonError) as caught:
        find_model()
    assert caught.value.code == "default_model_missing"
    for part in ("called 'org/a'", str(models), "`gryphon use MODEL`", "--unset"):
        assert part in caught.value.message
    listed = run("list")  # shows what there is all the same
    assert listed.status == 0 and "mine" in listed.stdout and "gryphon use" in listed.stdout
    with pytest.raises(GryphonError, match="set as the default model"):
        model_for(None, yes=True)  # nothing answers in its place, and nothing is downloaded
    assert run("use").status == 1
    assert run("use", "mine").status == 0 and find_model().name == "mine"


def test_an_alias_is_accepted_wherever_a_model_is_named(
    models: Path, run: Run, tmp_path: Path
) -> None:
    done = run("alias", "fast", "org/a")
    assert (done.status, done.stdout) == (0, "fast stands for org/a.\n")
    model = find_model("fast")
    assert model == find_model("org/a") and model.name == "org/a"
    assert run("show", "fast").stdout == run("show", "org/a").stdout
    assert run("verify", "fast").stdout.startswith("org/a is whole")
    assert "org/a is installed already" in run("pull", "fast").stdout
    adapter = write_adapter(tmp_path / "style")
    assert run("adapters", "add", str(adapter), "--base", "fast").status == 0
    assert run("alias", "styled", "org/a+style").status == 0
    assert find_model("styled").name == "org/a+style"
    assert run("use", "fast").status == 0 and find_model().name == "org/a"
    listed = run("list").stdout
    assert "ALIASES" in listed and listed.splitlines()[2].endswith("fast")
    assert {one["name"]: one["aliases"] for one in json.loads(run("list", "--json").stdout)} == {
        "mine": [], "org/a": ["fast"], "org/a+style": ["styled"],
    }  # fmt: skip


def test_an_alias_is_accepted_over_rest_and_never_leads_to_a_path(
    models: Path, run: Run, home: Path
) -> None:
    run("alias", "fast", "org/a")
    with models.open("a") as file:
        file.write(f'evil = "{home / "data" / "models" / "mine"}"\nloop = "fast"\n')
    server = ServerThread(FakeEngine, ServerOptions(port=0))
    server.start()
    try:
        for name, status in (("fast", 200), ("org/a", 200), ("evil", 404), ("loop", 404)):
            address = urllib.parse.urlsplit(server.url).netloc
            connection = http.client.HTTPConnection(address, timeout=20)
            connection.request("GET", f"/v1/models/{name}")
            response = connection.getresponse()
            fields = json.loads(response.read())
            assert (response.status, fields.get("id")) == (
                status,
                "org/a" if status == 200 else None,
            )
            connection.close()
    finally:
        server.stop()
    assert "not installed any more" in run("show", "evil").stderr


def test_aliases_are_listed_changed_and_removed(models: Path, run: Run) -> None:
    assert "No alias is set" in run("alias").stdout
    run("alias", "fast", "org/a")
    done = run("alias", "fast", "mine")
    assert done.stdout == "fast now stands for mine; it stood for org/a.\n"
    run("alias", "other", "fast")  # an alias of an alias is one of its model
    fields = [{"alias": name, "model": "mine", "installed": True} for name in ("fast", "other")]
    assert json.loads(run("alias", "--json").stdout) == fields
    assert run("alias", "--rm", "fast").stdout == "fast no longer stands for mine.\n"
    done = run("alias", "--rm", "fast")
    assert done.status == 1 and "Aliases: other." in done.stderr
    for words in (["alias", "x"], ["alias", "--rm", "other", "x"], ["alias", "a/b", "mine"]):
        assert run(*words).status == 2
    assert run("alias", "x", "gone").status == run("alias", "x", "./mine").status == 1
    assert run("alias").stdout.splitlines()[1].split() == ["other", "mine"]


def test_an_alias_never_hides_a_model(models: Path, run: Run, home: Path) -> None:
    for name in ("mine", "smollm2-135m"):
        done = run("alias", name, "org/a")
        assert done.status == 2 and "is the name of a model" in done.stderr
    run("alias", "later", "org/a")
    write_own(home, "later")
    assert find_model("later").source == "gryphon"
    assert "hidden by a model of that name" in run("alias").stdout


def test_removing_by_an_alias_is_refused_and_a_removed_model_is_said(
    models: Path, run: Run
) -> None:
    run("alias", "fast", "org/a")
    done = run("rm", "fast", "--yes")
    assert done.status == 2 and "`gryphon rm org/a`" in done.stderr
    assert find_model("org/a").path.is_dir()
    done = run("rm", "org/a", "--dry-run", "--json")
    assert json.loads(done.stdout)["named_by"] == ["what the alias fast stands for"]
    assert (
        "It is what the alias fast stands for: choose another" in run("rm", "org/a", "--yes").stderr
    )
    assert (
        "fast is an alias of org/a, which is not installed any more" in run("show", "fast").stderr
    )
    assert run("alias").stdout.splitlines()[1].split() == ["fast", "org/a", "not", "installed"]
    assert run("pull", "fast").status == 0  # brings it back
    assert find_model("fast").name == "org/a"


def test_a_damaged_model_is_told_from_a_removed_one(models: Path, run: Run) -> None:
    run("alias", "fast", "org/a")
    (find_model("org/a").path / "config.json").resolve().write_text("{")
    assert "config.json" in run("verify", "fast").stdout
    done = run("show", "fast")
    assert "not valid JSON" in done.stderr


def test_a_settings_file_that_is_wrong_stops_only_what_needs_it(models: Path, run: Run) -> None:
    models.parent.mkdir(exist_ok=True)
    models.write_text("defualt_model = 'x'\n")
    assert find_model("org/a").name == "org/a"
    for words in (["list"], ["use"], ["alias"], ["show"], ["show", "unknown"]):
        done = run(*words)
        assert done.status == 1, words
        assert "line 1: 'defualt_model' is no setting" in done.stderr
