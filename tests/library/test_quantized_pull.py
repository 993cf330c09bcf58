"""`gryphon pull -q`: fetched and converted as one step, whatever interrupts it in either half."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from app.cli import main
from app.library import leftovers
from app.library.conversion import read_record
from app.library.hub_cache import RepositoryCache
from app.library.installed import find_model, installed_models

from ..hub_server import HubServer
from ..tiny_models import GEMMA2, write_model
from .test_conversion import WIDE, digests, events, gryphon, home

__all__ = ["home"]  # a fixture

GRYPHON = str(Path(sys.executable).with_name("gryphon"))
WAY = ("-q", "4", "--group-size", "32", "--shard-bytes", "40000")
KILLS = int(os.environ.get("GRYPHON_TEST_KILLS", "2"))


def full_precision(path: Path, count: int = 3, **changes: Any) -> dict[str, bytes]:
    """The files of a repository with float weights in several shards."""
    source = write_model(path, GEMMA2 | WIDE | changes)
    weights: dict[str, mx.array] = mx.load(str(source / "model.safetensors"))  # type: ignore[assignment]
    (source / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: weights[name] for name in names[number::count]}
        mx.save_safetensors(str(source / file), part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {file.name: file.read_bytes() for file in source.iterdir()}


@pytest.fixture
def repository(hub: HubServer, tmp_path: Path) -> dict[str, bytes]:
    """The content of org/tiny."""
    files = full_precision(tmp_path / "source", vocab_size=2000)
    hub.add("org/tiny", files, license="gemma")
    return files


def run(capsys: pytest.CaptureFixture[str], *words: str) -> SimpleNamespace:
    status = main(["pull", *words])
    output = capsys.readouterr()
    return SimpleNamespace(status=status, out=output.out, err=output.err)


def names() -> list[str]:
    return [model.name for model in installed_models()]


def test_the_result_is_installed_and_the_source_is_gone(
    hub: HubServer, repository: dict[str, bytes], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done = run(capsys, "org/tiny", *WAY, "--json")
    assert done.status == 0, done.err
    told = events(done.out)
    plan, result = told[0], told[-1]
    assert plan["repository"] == "org/tiny" and plan["missing_bytes"] == sum(
        map(len, repository.values())
    )
    assert plan["fit"]["verdict"] == "fits" and 0 < plan["result_bytes"] < plan["missing_bytes"] / 3
    kinds = [event["type"] for event in told]
    assert kinds.index("progress") < kinds.index("converting") < kinds.index("installed")
    assert (result["name"], names()) == ("tiny-4bit-g32", ["tiny-4bit-g32"])
    assert not RepositoryCache("org/tiny").path.exists()
    model = find_model("tiny-4bit-g32")
    record = read_record(model.path)
    assert (record["source"], len(record["commit"])) == ("org/tiny", 40)
    assert "license: gemma" in (model.path / "README.md").read_text()
    assert main(["convert", str(tmp_path / "source"), *WAY, "--out", "same"]) == 0
    ours, same = digests(model.path), digests(find_model("same").path)
    assert {n: d for n, d in ours.items() if n not in ("README.md", "conversion.json")} == {
        n: d for n, d in same.items() if n not in ("README.md", "conversion.json")
    }
    capsys.readouterr()
    asked = len(hub.answers())
    again = run(capsys, "org/tiny", *WAY)
    assert again.status == 0 and "is installed already" in again.out
    assert not any("model-0000" in str(one.file) and one.sent > 20_000
                   for one in hub.answers()[asked:])  # fmt: skip


def test_killed_in_either_half_it_goes_on(hub: HubServer, repository: dict[str, bytes]) -> None:
    total = sum(map(len, repository.values()))
    hub.bytes_per_s = 60e6
    assert gryphon("pull", "org/tiny", *WAY, "--out", "want").returncode == 0
    want = digests(find_model("want").path)
    assert main(["rm", "want", "--yes"]) == 0
    moments = random.Random(KILLS)
    cache = RepositoryCache("org/tiny")
    words = [GRYPHON, "pull", "org/tiny", *WAY, "--out", "made", "--json"]
    for _ in range(KILLS):  # while it is fetched
        budget = [moments.randrange(1, total // (KILLS + 1))]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

        def count(file: str, offset: int, process: Any = process, budget: Any = budget) -> None:
            budget[0] -= 1 << 16
            if budget[0] < 0:
                process.kill()

        hub.on_bytes(count)
        process.communicate(timeout=60)
        hub.on_bytes(None)
        assert process.returncode == -signal.SIGKILL
        assert names() == []
    kept = 0
    for _ in range(KILLS):  # while it is converted
        fetched = {file.name: file.stat().st_size for file in cache.blobs.glob("*")}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = moments.randrange(1, 6)
        for line in process.stdout:
            event = json.loads(line)
            if event["type"] in ("kept", "converting"):
                lines -= 1
                if event["type"] == "kept":
                    assert event["shards"] >= kept
                    kept = event["shards"]
            if lines == 0:
                break
        process.kill()
        process.communicate(timeout=60)
        assert names() == []
        assert all((cache.blobs / name.split(".")[0]).exists() for name in fetched)
    answered = len(hub.answers())
    done = gryphon("pull", "org/tiny", *WAY, "--out", "made", "--json")
    assert done.returncode == 0, done.stderr
    # Headers and small files are looked at again; no weights are.
    again = sum(one.sent for one in hub.answers()[answered:])
    assert again < total / 4
    made = digests(find_model("made").path)
    assert made | {"README.md": ""} == want | {"README.md": ""}
    assert not cache.path.exists() and names() == ["made"]


def test_what_was_left_half_way_can_be_removed(
    hub: HubServer, repository: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [GRYPHON, "pull", "org/tiny", *WAY, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["type"] == "kept":
            break
    process.kill()
    process.communicate(timeout=60)
    assert names() == []
    assert RepositoryCache("org/tiny").path.exists()
    assert main(["rm", "org/tiny", "--yes"]) == 0
    assert "an unfinished pull" in capsys.readouterr().out
    assert not RepositoryCache("org/tiny").path.exists()
    for path in find_staging().rglob("*"):
        os.utime(path, (1, 1))
    os.utime(find_staging(), (1, 1))
    assert find_staging() in [path for one in leftovers.leftovers() for path in one.paths]


def find_staging() -> Path:
    from app import paths

    return paths.models_dir() / ".tiny-4bit-g32.partial-convert"


def test_a_source_that_is_to_stay_or_was_here_stays(
    hub: HubServer, repository: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "org/tiny", *WAY, "--keep-source").status == 0
    assert names() == ["org/tiny", "tiny-4bit-g32"]
    told = run(capsys, "org/tiny", "-q", "8", "--group-size", "32", "--dry-run")
    assert "stays as a model too" in told.out
    answered = len(hub.answers())
    assert run(capsys, "org/tiny", "-q", "8", "--group-size", "32").status == 0
    assert names() == ["org/tiny", "tiny-4bit-g32", "tiny-8bit-g32"]
    assert sum(one.sent for one in hub.answers()[answered:]) < 100_000
    files = {path.name: path.read_bytes() for path in find_model("org/tiny").path.iterdir()}
    assert files == repository


def test_what_another_revision_shares_stays(
    hub: HubServer, repository: dict[str, bytes], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = full_precision(tmp_path / "other", seed=1, vocab_size=2000)
    assert other["tokenizer.json"] == repository["tokenizer.json"]
    hub.repositories["org/tiny"].commit(other, "v2")
    assert run(capsys, "org/tiny@v2").status == 0
    assert run(capsys, "org/tiny", *WAY).status == 0
    assert names() == ["org/tiny@v2", "tiny-4bit-g32"]
    place = find_model("org/tiny@v2").path
    assert {path.name: path.read_bytes() for path in place.iterdir()} == other


def test_a_source_can_be_had_later_too(
    hub: HubServer, repository: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "org/tiny", *WAY).status == 0
    assert names() == ["tiny-4bit-g32"]
    assert run(capsys, "org/tiny", *WAY, "--keep-source").status == 0
    assert names() == ["org/tiny", "tiny-4bit-g32"]


def test_another_commit_does_not_replace_the_result(
    hub: HubServer, repository: dict[str, bytes], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(capsys, "org/tiny", *WAY).status == 0
    before = digests(find_model("tiny-4bit-g32").path)
    hub.repositories["org/tiny"].commit(full_precision(tmp_path / "new", seed=1, vocab_size=2000))
    said = run(capsys, "org/tiny", *WAY)
    assert said.status == 1 and "exists already, made from org/tiny" in said.err
    assert digests(find_model("tiny-4bit-g32").path) == before
    assert run(capsys, "org/tiny", *WAY, "--out", "newer").status == 0
    said = run(capsys, "org/tiny", "-q", "8", "--group-size", "32", "--out", "newer")
    assert said.status == 1 and "newer exists already" in said.err


def test_what_people_read(
    hub: HubServer, repository: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(capsys, "org/tiny", *WAY, "--dry-run")
    assert done.status == 0 and done.err == ""
    for words in ("tiny-4bit-g32 from org/tiny", "gemma", "download", "goes when it is converted",
                  "4-bit, groups of 32", "verdict"):  # fmt: skip
        assert words in done.out, words
    assert names() == []
    quantized = full_precision(Path(str(find_staging()) + "-x"), quantization={"bits": 4})
    hub.add("org/packed", quantized)
    for words, said in [
        (["org/packed", *WAY], "is quantized already (its config.json has quantization)"),
        (["smollm2-135m", "-q", "4"], "is quantized already; pull it without -q"),
        (["org/tiny", "--keep-source"], "--keep-source goes with -q"),
        (["org/tiny", "--out", "x"], "--out goes with -q"),
        (["org/tiny", "-q", "7"], "bits 7: affine has"),
        (["org/gone", "-q", "4"], "Check the name"),
    ]:
        done = run(capsys, *words)
        assert done.status in (1, 2) and said in done.err, done.err
    assert not any((one.file or "").endswith(".safetensors") and one.sent > 20_000
                   for one in hub.answers())  # fmt: skip


def test_ctrl_c_names_the_command_that_goes_on(
    hub: HubServer, repository: dict[str, bytes]
) -> None:
    reached = threading.Event()
    hub.bytes_per_s = 500_000
    hub.on_bytes(lambda file, offset: reached.set() if offset > 100_000 else None)
    process = subprocess.Popen(
        [GRYPHON, "pull", "org/tiny", *WAY],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reached.wait(60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    words = "`gryphon pull org/tiny -q 4 --group-size 32 --shard-bytes 40000` goes on from here."
    assert errors.splitlines()[-1].endswith(words)
