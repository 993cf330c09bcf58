"""Searching, verifying, repairing and removing, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, scan_cache_dir

from app.cli import main
from app.library.hub_cache import RepositoryCache
from app.library.installed import find_model, installed_models

from ..hub_server import HubServer
from .model_files import CONFIG, model_files, safetensors

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> SimpleNamespace:
        status = main(words)
        output = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=output.out, stderr=output.err)

    return run


def names() -> list[str]:
    return [model.name for model in installed_models()]


def blobs(name: str = "org/model") -> int:
    return sum(path.stat().st_size for path in RepositoryCache(name).blobs.iterdir())


# Verify.


def test_a_whole_model_is_whole(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files(shards=2))
    run("pull", "org/model")
    done = run("verify", "org/model")
    assert (done.status, done.stdout) == (
        0,
        "org/model is whole: 7 files, 7 compared with their digest.\n",
    )
    assert json.loads(run("verify", "--json").stdout)["damaged"] == 0


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"]
)
@pytest.mark.parametrize("at", [0, -1])
def test_a_changed_byte_is_found_and_repaired_alone(
    hub: HubServer, run: Run, name: str, at: int
) -> None:
    files = model_files(config=CONFIG | {"note": "x" * 100})
    hub.add("org/model", files)
    run("pull", "org/model")
    path = find_model("org/model").path
    data = bytearray((path / name).read_bytes())
    data[at] ^= 1 if name != "config.json" else 0
    if name == "config.json":
        data = bytearray(data.replace(b"xxx", b"yyy", 1))
    (path / name).resolve().write_bytes(data)
    done = run("verify", "org/model")
    assert done.status == 1 and f"{name}: its content is not what the hub has" in done.stdout
    assert "1 of 5 files are damaged" in done.stdout
    before = hub.sent()
    repaired = run("verify", "--repair", "org/model")
    assert repaired.status == 0, repaired
    fetched = hub.sent() - before
    assert len(files[name]) <= fetched <= 2 * len(files[name]) + 200
    assert {one.name: one.read_bytes() for one in path.iterdir()} == files
    assert run("verify", "org/model").status == 0


def test_what_else_can_be_wrong_with_a_file(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.add("org/model", model_files() | {"a.txt": b"a", "b.txt": b"b", "c.json": b"{}"})
    run("pull", "org/model")
    path = find_model("org/model").path
    (path / "a.txt").resolve().unlink()
    (path / "b.txt").unlink()
    (tmp_path / "elsewhere").write_text("b")
    (path / "b.txt").symlink_to(tmp_path / "elsewhere")
    (path / "c.json").unlink()
    (path / "c.json").symlink_to("../../../../../../etc/hostname")
    done = run("verify", "org/model", "--json")
    problems = {one["name"]: one["problem"] for one in json.loads(done.stdout)["files"]}
    assert done.status == 1
    assert problems["a.txt"] == "its content is missing"
    assert problems["b.txt"] == problems["c.json"] == "leads out of the repository's blobs"
    assert {name for name, problem in problems.items() if problem} == {"a.txt", "b.txt", "c.json"}


def test_models_without_digests_have_their_headers_checked(home: Path, run: Run) -> None:
    path = home / "data" / "models" / "mine"
    path.mkdir(parents=True)
    for name, data in model_files(shards=2).items():
        (path / name).write_bytes(data)
    assert "7 files, 0 compared" in run("verify", "mine").stdout
    second = path / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    done = run("verify", "mine")
    assert done.status == 1 and "cut short" in done.stdout and "--repair" not in done.stdout


# Remove.


def test_removing_frees_what_it_says(hub: HubServer, run: Run) -> None:
    files = model_files()
    hub.add("org/model", files)
    run("pull", "org/model")
    would = run("rm", "org/model", "--dry-run")
    assert would.status == 0 and "which frees 22 kB" in would.stdout
    assert names() == ["org/model"]
    done = json.loads(run("rm", "org/model", "--yes", "--json").stdout)
    assert done["freed_bytes"] == sum(map(len, files.values()))
    assert names() == [] and not RepositoryCache("org/model").path.exists()
    assert run("rm", "org/model", "--yes").status == 1


def test_content_that_another_revision_shares_stays(hub: HubServer, run: Run) -> None:
    first = model_files(shards=2)
    shared, own = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    second = first | {own: model_files(shards=2, seed=1)[own]}
    repository = hub.add("org/model", first)
    repository.commit(second, "v2")
    run("pull", "org/model")
    run("pull", "org/model@v2")
    before = blobs()
    done = json.loads(run("rm", "org/model", "--yes", "--json").stdout)
    assert done["freed_bytes"] == before - blobs() == len(first[own])
    assert names() == ["org/model@v2"]
    model = find_model("org/model@v2")
    assert (model.path / shared).read_bytes() == first[shared]
    assert run("verify", "org/model@v2").status == 0
    run("pull", "org/model")
    done = json.loads(run("rm", "org/model@v2", "--yes", "--json").stdout)
    assert done["freed_bytes"] == len(second[own])
    assert names() == ["org/model"] and run("verify", "org/model").status == 0


def test_commits_that_nothing_names_go_with_the_model(hub: HubServer, run: Run) -> None:
    repository = hub.add("org/model", model_files())
    run("pull", "org/model")
    repository.commit(model_files(seed=1))
    run("pull", "org/model")
    assert len(list(RepositoryCache("org/model").snapshots.iterdir())) == 2
    run("rm", "org/model", "--yes")
    assert not RepositoryCache("org/model").path.exists()


def test_a_copy_of_the_repository_with_the_same_commits_stays(hub: HubServer, run: Run) -> None:
    repository = hub.add("org/model", model_files())
    for name in ("org/a-copy", "org/copy", "org/zcopy"):
        copy = hub.add(name, {})
        copy.commits, copy.refs = repository.commits, repository.refs
        run("pull", name)
    run("pull", "org/model")
    run("rm", "org/model", "--yes")
    assert names() == ["org/a-copy", "org/copy", "org/zcopy"]
    run("rm", "org/copy", "--yes")
    assert names() == ["org/a-copy", "org/zcopy"]


def test_an_unfinished_pull_can_be_removed(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files())
    cache = RepositoryCache("org/model")
    cache.blobs.mkdir(parents=True)
    (cache.blobs / f"{'a' * 64}.incomplete").write_bytes(bytes(5000))
    done = run("rm", "org/model", "--yes")
    assert done.stdout == "Removed an unfinished pull of org/model: 5.0 kB are free again.\n"
    assert not cache.path.exists()


def test_a_damaged_model_can_be_removed(hub: HubServer, run: Run, home: Path) -> None:
    hub.add("org/model", model_files())
    run("pull", "org/model")
    (find_model("org/model").path / "config.json").resolve().write_text("{")
    assert names() == []
    assert run("rm", "org/model", "--yes").status == 0
    own = home / "data" / "models" / "broken"
    own.mkdir(parents=True)
    assert run("rm", "broken", "--yes").status == 0
    assert not own.exists() and [path.name for path in own.parent.iterdir()] == ["adapters"]


def test_nothing_is_removed_without_a_yes_or_during_a_pull(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files())
    run("pull", "org/model")
    done = run("rm", "org/model")
    assert done.status == 2 and "--yes" in done.stderr
    with RepositoryCache("org/model").locked(lambda: None):
        done = run("rm", "org/model", "--yes")
    assert done.status == 1 and "is running" in done.stderr
    assert names() == ["org/model"]
    for name in ("nope", "org/nope", "../..", "/etc", "org/../model", "org/model@v9"):
        assert run("rm", name, "--yes").status == 1
    assert names() == ["org/model"]
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings
    shutil.rmtree(constants.HF_HUB_CACHE)


# Search.


def test_search_shows_what_runs(hub: HubServer, run: Run) -> None:
    hub.add("org/a-model", model_files(size=2_000_000))
    packed = {"w.weight": ("U32", [100], bytes(400)), "w.scales": ("F16", [50], bytes(100))}
    four_bit = model_files(config={"model_type": "llama", "quantization": {"bits": 4}})
    hub.add("org/B-MODEL-4bit", four_bit | {"model.safetensors": safetensors(packed)}, gated="auto")
    hub.add("org/model-bert", model_files(config={"model_type": "bert"}))
    hub.add("org/model-code", model_files(config=CONFIG | {"auto_map": {"a": "b"}}))
    hub.add("org/model-gguf", {"model.gguf": b"x"})
    hub.add("org/other", model_files())
    run("pull", "org/a-model")
    found = json.loads(run("search", "model", "--json").stdout)
    assert [(one["name"], one["family"], one["weight_bytes"]) for one in found] == [
        ("org/a-model", "open-llama", 2_000_000),
        ("org/B-MODEL-4bit", "llama", 500),
    ]
    assert [one["quantization"] for one in found] == ["float16", "4-bit"]
    shown = run("search", "MODEL").stdout
    assert "2.0 MB" in shown and "installed" in shown and "gated" in shown
    assert len(json.loads(run("search", "model", "--limit", "1", "--json").stdout)) == 1
    assert "nothing that runs" in run("search", "no such thing").stdout
    assert run("search", "model", "--limit", "0").status == 2


def test_a_family_that_nothing_runs_is_refused_before_the_download(
    hub: HubServer, run: Run
) -> None:
    hub.add("org/model", model_files(config={"model_type": "bert"}))
    done = run("pull", "org/model")
    assert done.status == 1 and "'bert'" in done.stderr
    assert hub.sent("model.safetensors") == 0
