"""Searching, verifying, repairing and removing, through the command line."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, scan_cache_dir

from app.cli import main
from app.errors import GryphonError
from app.library.hub import Hub
from app.library.hub_cache import RepositoryCache
from app.library.installed import find_model, installed_models
from app.library.patience import Patience
from app.library.search import search
from app.library.verification import DIGESTS, write_digests

from ..hub_server import Fault, HubServer
from .model_files import CONFIG, model_files, safetensors
from .test_adapters import write_adapter

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


def test_models_made_here_are_compared_with_what_was_installed(home: Path, run: Run) -> None:
    path = home / "data" / "models" / "smollm2-135m"
    path.mkdir(parents=True)
    for name, data in model_files().items():
        (path / name).write_bytes(data)
    write_digests(path)
    assert stat.S_IMODE((path / DIGESTS).stat().st_mode) == 0o600
    assert "is whole: 5 files, 5 compared" in run("verify", "smollm2-135m").stdout
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # which no header tells
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.model").unlink()
    done = run("verify", "smollm2-135m")
    assert done.status == 1 and "2 of 5 files are damaged" in done.stdout
    assert "model.safetensors: its content is not what was installed" in done.stdout
    assert "tokenizer.model: its content is missing" in done.stdout
    assert done.stdout.endswith("`gryphon pull smollm2-135m` fetch it anew.\n")
    for text in ("{", "[]", '{"../x": 3, "config.json": "no digest"}'):
        (path / DIGESTS).write_text(text)
        assert "4 files, 0 compared" in run("verify", "smollm2-135m").stdout


def test_links_that_lead_elsewhere_are_repaired(hub: HubServer, run: Run, tmp_path: Path) -> None:
    files = model_files()
    hub.add("org/model", files)
    run("pull", "org/model")
    path = find_model("org/model").path
    (path / "tokenizer.json").unlink()
    (tmp_path / "other").write_bytes(bytes(len(files["tokenizer.json"])))  # of the same size
    (path / "tokenizer.json").symlink_to(tmp_path / "other")
    assert run("verify", "--repair", "org/model").status == 0
    assert run("verify", "org/model").status == 0
    assert {one.name: one.read_bytes() for one in path.iterdir()} == files


def test_a_damaged_header_is_repaired(hub: HubServer, run: Run) -> None:
    files = model_files()
    hub.add("org/model", files)
    run("pull", "org/model")
    path = find_model("org/model").path
    weights = (path / "model.safetensors").resolve()
    weights.write_bytes(bytes(len(files["model.safetensors"])))
    assert run("pull", "org/model").status == 0  # even by those who do not know of `verify`
    assert {one.name: one.read_bytes() for one in path.iterdir()} == files


def test_a_repair_that_cannot_be_fetched_removes_nothing(hub: HubServer, run: Run) -> None:
    hub.add("org/model", model_files())
    run("pull", "org/model")
    path = find_model("org/model").path
    (path / "tokenizer.model").resolve().write_bytes(bytes(2_000))
    hub.repositories.clear()
    done = run("verify", "--repair", "org/model")
    assert done.status == 1 and "no model org/model" in done.stderr
    assert (path / "tokenizer.model").is_file() and names() == ["org/model"]


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


# Adapters.


@pytest.fixture
def adapted(hub: HubServer, home: Path, run: Run, tmp_path: Path) -> Path:
    """org/model with an adapter on it, org/model+mine; returns the adapter's directory."""
    hub.add("org/model", model_files())
    run("pull", "org/model")
    given = write_adapter(tmp_path / "mine")
    assert run("adapters", "add", str(given), "--base", "org/model").status == 0
    assert names() == ["org/model", "org/model+mine"]
    return home / "data" / "models" / "adapters" / "mine"


def test_removing_a_model_with_an_adapter_leaves_its_base(adapted: Path, run: Run) -> None:
    size = sum(one.stat().st_size for one in adapted.iterdir())
    would = json.loads(run("rm", "org/model+mine", "--dry-run", "--json").stdout)
    assert (would["path"], would["freed_bytes"]) == (str(adapted), size)
    assert run("rm", "org/model+mine", "--yes").status == 0
    assert names() == ["org/model"] and not adapted.exists()
    assert [one.name for one in adapted.parent.iterdir()] == []


def test_removing_a_base_says_which_adapters_need_it(adapted: Path, run: Run) -> None:
    for words in (["--dry-run"], ["--yes"]):
        done = run("rm", "org/model", *words)
        assert done.status == 0 and "the adapters mine" in done.stderr
    assert names() == [] and adapted.is_dir()
    assert "org/model, which is not installed" in run("show", "org/model+mine").stderr
    assert run("rm", "org/model+mine", "--yes").status == 0  # a name that is no model any more
    assert not adapted.exists()


def test_a_model_with_an_adapter_is_verified_with_it(adapted: Path, run: Run) -> None:
    assert "org/model+mine is whole: 8 files, 5 compared" in run("verify", "org/model+mine").stdout
    tensors = adapted / "adapters.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    done = run("verify", "org/model+mine", "--repair")
    assert done.status == 1 and "adapters.safetensors: " in done.stdout
    assert "--repair" not in done.stdout and tensors.is_file()
    tensors.write_bytes(whole)
    (find_model("org/model").path / "tokenizer.model").resolve().write_bytes(bytes(2_000))
    done = run("verify", "org/model+mine")
    assert done.status == 1 and "`gryphon verify --repair org/model` fetches" in done.stdout
    assert run("verify", "org/model+mine", "--repair").status == 0
    assert run("verify", "org/model+mine").status == 0


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


def test_a_search_that_nobody_answers_ends(hub: HubServer) -> None:
    hub.api_faults.append(Fault(stall_at=0, times=None))
    quick = Patience(stall_s=0.2, attempts=2, first_wait_s=0.01)
    with Hub(quick) as client, pytest.raises(GryphonError) as caught:
        search(client, "model", 5)
    assert caught.value.code == "hub_unavailable"


@pytest.mark.parametrize(
    "parameters",
    [{"F16": "9" * 9}, {"F16": -5}, {"F16": 10**400}, {"F16": None}, [3], 7, {"F16": True}],
)
def test_a_search_survives_counts_that_are_none(hub: HubServer, parameters: Any) -> None:
    hub.add("org/model", model_files())
    found = {"parameters": parameters, "total": 1}
    hub.search_extra = {"safetensors": found, "downloads": "many"}
    with Hub(Patience(attempts=1)) as client:
        assert search(client, "model", 5) == []
