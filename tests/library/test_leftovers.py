"""`gryphon du` and `gryphon prune`: what no model needs goes, and nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, scan_cache_dir

from app.cli import main
from app.library.hub_cache import RepositoryCache
from app.library.installed import find_model, installed_models
from app.library.leftovers import QUIET_S

from ..hub_server import HubServer
from .model_files import model_files
from .test_adapters import write_adapter

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], home: Path) -> Run:
    def run(*words: str) -> SimpleNamespace:
        status = main(words)
        output = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=output.out, stderr=output.err)

    return run


def age(*roots: Path) -> None:
    """As if nothing had been written there lately."""
    then = time.time() - QUIET_S - 60
    for root in roots:
        for path in (root, *root.rglob("*")):
            os.utime(path, (then, then), follow_symlinks=False)


def disk() -> int:
    """Bytes of content in the Hugging Face cache."""
    found = Path(constants.HF_HUB_CACHE).glob("models--*/**/*")
    return sum(path.stat().st_size for path in found if path.is_file() and not path.is_symlink())


def pruned(run: Run) -> dict[str, str]:
    """Prune, and check that it frees what it says; returns what went, by name."""
    before = disk()
    would = json.loads(run("prune", "--dry-run", "--json").stdout)
    assert disk() == before and not would["removed"]
    assert json.loads(run("du", "--json").stdout)["prunable_bytes"] == would["freed_bytes"]
    done = json.loads(run("prune", "--yes", "--json").stdout)
    assert done == would | {"removed": bool(would["leftovers"])}
    return {one["name"]: one["what"] for one in done["leftovers"]}


def test_old_commits_go_and_what_the_new_one_shares_stays(hub: HubServer, run: Run) -> None:
    first = model_files(shards=2)
    own = "model-00002-of-00002.safetensors"
    repository = hub.add("org/model", first)
    run("pull", "org/model")
    old = find_model("org/model").path
    second = first | {own: model_files(shards=2, seed=1)[own]}
    repository.commit(second)
    run("pull", "org/model")
    assert pruned(run) == {}  # it was fetched just now
    age(Path(constants.HF_HUB_CACHE))
    before = disk()
    assert pruned(run) == {"org/model": f"commits that no branch or tag names: {old.name[:8]}"}
    assert before - disk() == len(first[own]) and not old.exists()
    path = find_model("org/model").path
    assert {one.name: one.read_bytes() for one in path.iterdir()} == second
    assert run("verify", "org/model").status == 0
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings
    assert pruned(run) == {} and "Nothing to remove" in run("prune").stdout


def test_commits_that_are_named_or_needed_stay(hub: HubServer, run: Run, tmp_path: Path) -> None:
    repository = hub.add("org/model", model_files())
    run("pull", "org/model")
    base = f"org/model@{find_model('org/model').path.name}"
    assert run("adapters", "add", str(write_adapter(tmp_path / "a")), "--base", base).status == 0
    repository.commit(model_files(seed=1), "v2")
    run("pull", "org/model@v2")
    repository.commit(model_files(seed=2))
    run("pull", "org/model")
    hub.add("org/other", model_files(seed=3))  # named by its commit alone
    commit = hub.repositories["org/other"].refs["main"]
    run("pull", f"org/other@{commit}")
    age(Path(constants.HF_HUB_CACHE))
    before, models = disk(), installed_models()
    assert pruned(run) == {}
    assert (disk(), installed_models()) == (before, models)


def test_an_old_commit_stays_while_the_new_one_is_not_whole(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files())
    run("pull", "org/model")
    cache = RepositoryCache("org/model")
    (cache.path / "refs" / "main").write_text("b" * 40)
    for snapshot in (None, cache.snapshots / ("b" * 40)):
        if snapshot is not None:
            snapshot.mkdir()
            (snapshot / "config.json").write_text("{}")
        age(Path(constants.HF_HUB_CACHE))
        assert pruned(run) == {}
    assert len(list(cache.snapshots.iterdir())) == 2


def test_unfinished_pulls_go_once_nothing_is_written_to_them(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files())
    run("pull", "org/model")
    cache, alone = RepositoryCache("org/model"), RepositoryCache("org/alone")
    for one in (cache, alone):
        one.blobs.mkdir(parents=True, exist_ok=True)
        (one.blobs / f"{'a' * 64}.incomplete").write_bytes(bytes(5000))
        (one.blobs / ("b" * 64)).write_bytes(bytes(3000))
    assert pruned(run) == {}
    age(Path(constants.HF_HUB_CACHE))
    (cache.blobs / ("b" * 64)).write_bytes(bytes(3000))  # somebody is at it
    assert pruned(run) == {"org/model": "an unfinished pull", "org/alone": "an unfinished pull"}
    assert not alone.path.exists() and (cache.blobs / ("b" * 64)).exists()
    assert run("verify", "org/model").status == 0


def test_what_is_being_pulled_stays_and_the_rest_goes(hub: HubServer, run: Run) -> None:
    caches = [RepositoryCache(f"org/{name}") for name in "abc"]
    for one in caches:
        one.blobs.mkdir(parents=True)
        (one.blobs / f"{'a' * 64}.incomplete").write_bytes(bytes(5000))
    age(Path(constants.HF_HUB_CACHE))
    with caches[0].locked(lambda: None):
        done = run("prune", "--yes")
    assert done.status == 1 and "A pull of org/a is running" in done.stderr
    assert [one.path.exists() for one in caches] == [True, False, False]


def test_what_ended_processes_of_ours_left_goes(home: Path, hub: HubServer, run: Run) -> None:
    models = home / "data" / "models"
    left = [".smollm2-135m.partial-x1", ".removed-y", "adapters/.mine.removed"]
    stay = [".mine", "mine", "adapters/mine"]
    for name in (*left, *stay):
        (models / name).mkdir(parents=True)
        (models / name / "file").write_bytes(bytes(1000))
    assert run("prune", "--dry-run", "--json").stdout.count('"what"') == 0
    age(models)
    done = json.loads(run("prune", "--yes", "--json").stdout)
    assert done["freed_bytes"] == 3000
    assert [(models / name).exists() for name in left] == [False] * 3
    assert all((models / name / "file").exists() for name in stay)


def test_nothing_is_removed_without_a_yes(hub: HubServer, run: Run) -> None:
    blobs = RepositoryCache("org/model").blobs
    blobs.mkdir(parents=True)
    (blobs / f"{'a' * 64}.incomplete").write_bytes(bytes(5000))
    age(Path(constants.HF_HUB_CACHE))
    done = run("prune")
    assert done.status == 2 and "--yes" in done.stderr
    assert "org/model: an unfinished pull, 5.0 kB" in done.stdout
    assert "`gryphon prune` removes that" in run("du").stdout
    assert list(blobs.iterdir())


def test_du_counts_everything_once(hub: HubServer, run: Run, tmp_path: Path) -> None:
    repository = hub.add("org/model", model_files())
    repository.commit(model_files(), "v2")
    run("pull", "org/model")
    run("pull", "org/model@v2")
    run("adapters", "add", str(write_adapter(tmp_path / "mine")), "--base", "org/model")
    used = json.loads(run("du", "--json").stdout)
    sizes = {one["name"]: one["bytes"] for one in used["entries"]}
    assert sizes.keys() == {"org/model", "adapter mine", "kept prompts and answers"}
    # The refs are files, too.
    assert sizes["org/model"] == disk() == sum(map(len, model_files().values())) + 2 * 40
    assert used["total_bytes"] == sum(sizes.values())
    assert "in all" in run("du").stdout
