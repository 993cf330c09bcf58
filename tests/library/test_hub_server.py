"""The genuine Hugging Face client takes the test hub for a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..hub_server import HubServer, running
from .model_files import model_files


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running() as server:
        yield server


def client(code: str, hub: HubServer, home: Path, **environment: str) -> str:
    """Run code against `huggingface_hub` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import huggingface_hub as hf\n{code}"],
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_snapshot_download_fetches_every_file(hub: HubServer, tmp_path: Path) -> None:
    files = model_files(shards=2) | {"README.md": b"# A model", "docs/more.json": b"{}"}
    repository = hub.add("org/model", files)
    path = client("print(hf.snapshot_download('org/model'))", hub, tmp_path)
    assert path.endswith(f"models--org--model/snapshots/{repository.refs['main']}")
    assert {name: Path(path, name).read_bytes() for name in files} == files
    shard = next(name for name in files if name.endswith(".safetensors"))
    hosts = {one.host for one in hub.answers(shard)}
    assert hosts == {"storage"}


def test_metadata_search_and_revisions(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.add("org/model", model_files())
    other = repository.commit(model_files(seed=1), "v2")
    code = (
        "api = hf.HfApi()\n"
        "info = api.model_info('org/model', revision='v2', files_metadata=True)\n"
        "weights, = [f for f in info.siblings if f.rfilename == 'model.safetensors']\n"
        "print(info.sha, info.card_data.license, weights.size, weights.lfs.sha256)\n"
        "print([b.name for b in api.list_repo_refs('org/model').branches])\n"
        "print([m.id for m in api.list_models(search='MOD')])"
    )
    weights = repository.commits[other]["model.safetensors"]
    first, branches, found = client(code, hub, tmp_path).splitlines()
    assert first == f"{other} apache-2.0 {len(weights)} {hub.etag('model.safetensors', weights)}"
    assert (branches, found) == ("['main', 'v2']", "['org/model']")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, "GatedRepoError 401"),
        ("unknown", "HfHubHTTPError 401"),
        ("narrow", "HfHubHTTPError 403"),
        ("stranger", "GatedRepoError 403"),
        ("member", "fetched"),
    ],
)
def test_gated_repositories(
    hub: HubServer, tmp_path: Path, token: str | None, expected: str
) -> None:
    hub.add("org/gated", model_files(), gated="manual")
    hub.tokens = {"narrow": set(), "stranger": {"gated"}, "member": {"gated", "org/gated"}}
    code = (
        "try:\n"
        "    hf.hf_hub_download('org/gated', 'model.safetensors')\n"
        "    print('fetched')\n"
        "except Exception as e:\n"
        "    e = e if hasattr(e, 'response') else e.__cause__\n"
        "    print(type(e).__name__, e.response.status_code)"
    )
    environment = {"HF_TOKEN": token} if token else {}
    assert client(code, hub, tmp_path, **environment) == expected
    assert all(one.authorization is None for one in hub.requests if one.host == "storage")


def test_missing_private_and_renamed_repositories(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/private", model_files(), private=True)
    hub.add("org/new", model_files())
    hub.add("org/old", model_files(), moved_to="org/new")
    hub.tokens = {"owner": {"org/private"}}
    code = (
        "for name in ('org/private', 'org/nothing', 'org/old'):\n"
        "    try:\n"
        "        print(hf.HfApi().model_info(name).id)\n"
        "    except Exception as e:\n"
        "        print(type(e).__name__, e.response.status_code)"
    )
    assert client(code, hub, tmp_path).splitlines() == [
        "HfHubHTTPError 401",
        "HfHubHTTPError 401",
        "org/new",
    ]
    assert client(code, hub, tmp_path, HF_TOKEN="owner").splitlines() == [
        "org/private",
        "RepositoryNotFoundError 404",
        "org/new",
    ]
