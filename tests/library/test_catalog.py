"""The catalog is what it says: known families, sizes that follow from the published ones, a page
for every entry, and nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.cli import main
from app.errors import GryphonError
from app.library.catalog import Build, families, parse
from app.library.fit import Budget
from app.library.pull import parse_name
from mlxmodels import registry

BUILDS = [build for family in families() for build in family.builds]
TIED = {"gemma", "gemma2"} | {"mlx-community/" + name for name in (
    "Llama-3.2-1B-Instruct-4bit", "Llama-3.2-3B-Instruct-4bit")}  # fmt: skip


def test_every_port_of_ours_has_builds_or_says_what_to_do() -> None:
    assert {family.name for family in families()} >= set(registry.NATIVE)
    for family in families():
        assert registry.supported(family.name), family.name
        assert bool(family.builds) != bool(family.instead)
    griffin = next(one for one in families() if one.name == "recurrent_gemma")
    assert "gryphon pull google/recurrentgemma-2b-it -q 4" in griffin.instead


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.repo)
def test_sizes_follow_from_the_published_ones(build: Build) -> None:
    sizes = build.config
    hidden, dim = sizes["hidden_size"], sizes["head_dim"]
    attention = 2 * hidden * dim * (sizes["num_attention_heads"] + sizes["num_key_value_heads"])
    mlp = (2 if build.family == "nemotron" else 3) * hidden * sizes["intermediate_size"]
    embedding = sizes["vocab_size"] * hidden
    tied = bool(TIED & {build.family, build.repo})
    layers = sizes["num_hidden_layers"] * (attention + mlp)
    norms = sizes["num_hidden_layers"] * 10 * hidden
    matrices = layers + embedding * (1 if tied else 2)
    assert matrices <= build.parameters <= matrices + norms
    packed = matrices if build.packed_embedding else matrices - embedding
    expected = packed * (build.bits + 0.5) / 8 + (matrices - packed) * 2
    assert build.size_bytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.repo)
def test_every_entry_names_a_page_and_can_be_pulled(build: Build) -> None:
    parts = urlsplit(build.source)
    assert parts.scheme == "https"
    if parts.netloc == "huggingface.co":
        assert parts.path.split("/")[1:3] == build.repo.split("/")
    else:
        assert parts.netloc == "github.com" and "/blob/" in parts.path
    assert parse_name(build.repo) == (build.repo, "main")
    assert f"{build.bits}bit" in build.repo.replace("-bit", "bit")


def test_a_verdict_is_that_of_the_arithmetic() -> None:
    build = next(one for one in BUILDS if one.repo == "mlx-community/gemma-2-9b-it-4bit")
    roomy, tight = (Budget(n * 10**9, "a test", on_gpu=True) for n in (16, 5))
    assert (build.fit(roomy).verdict, build.fit(roomy).largest_context) == ("fits", 8192)
    assert build.fit(roomy).footprint.weight_bytes == build.size_bytes
    assert build.fit(tight).verdict == "does not fit"


def whole() -> str:
    return resources.files("app.library").joinpath("catalog.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bits = 4", "bits = 7", "gemma-1.1-2b-it-4bit has the bits 7"),
        ("bits = 4", "bits = 4\nbites = 4", "bites, which is not known"),
        ('license = "gemma"', "", "has no license"),
        ('license = "gemma"', 'license = ""', "has the license ''"),
        ("size_bytes = 2_160_000_000", "size_bytes = -1", "has the size_bytes -1"),
        ("size_bytes = 2_160_000_000", "size_bytes = true", "has the size_bytes True"),
        ('size_from = "arithmetic"\np', 'size_from = "guess"\np', "has the size_from 'guess'"),
        ('source = "https', 'source = "http', "has the source"),
        ('repo = "mlx-community/gemma-1.1-2b-it-4bit"', 'repo = "../x"', "has the repo"),
        ("gemma-1.1-2b-it-4bit", "gemma-1.1-7b-it-4bit", "gemma-1.1-7b-it-4bit is there twice"),
        ('title = "Gemma"', 'title = "Gemma"\ninstead = "x"', "gemma has the instead"),
        ('title = "Gemma"', "", "gemma has no title"),
        ("hidden_size = 2048", "hidden_size = 0", "has the config"),
        ("[families.gemma]", "[families.gemma", "not TOML"),
        ("[families.gemma]", "[other]\n[families.gemma]", "other, which is not known"),
    ],
)
def test_a_damaged_catalog_is_refused_by_name(old: str, new: str, said: str) -> None:
    parse(whole())
    assert old in whole()
    with pytest.raises(GryphonError, match="damaged") as caught:
        parse(whole().replace(old, new, 1))
    assert said in caught.value.message


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    # Where nobody listens: the catalog asks nobody.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def run(*words: str) -> tuple[int, str, str]:
        status = main(words)
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def test_it_is_shown_without_a_network(run: Callable[..., Any], home: Path) -> None:
    status, shown, _ = run("search", "--catalog")
    assert status == 0
    for family in families():
        assert family.title in shown
        assert all(f"  {build.repo} " in shown for build in family.builds)
    assert "gryphon pull google/recurrentgemma-2b-it -q 4" in " ".join(shown.split())
    status, shown, _ = run("search", "--catalog", "--json")
    found = json.loads(shown)
    assert [one["family"] for one in found] == [family.name for family in families()]
    builds = [build for one in found for build in one["builds"]]
    assert [build["repo"] for build in builds] == [build.repo for build in BUILDS]
    assert {build["verdict"] for build in builds} <= {"fits", "fits, slowly", "does not fit"}
    assert not any(build["installed"] for build in builds)


def test_it_can_be_searched(run: Callable[..., Any]) -> None:
    def found(*words: str) -> list[str]:
        parts = json.loads(run("search", "--catalog", *words, "--json")[1])
        return [build["repo"] for one in parts for build in one["builds"]]

    assert found("minitron") == [build.repo for build in BUILDS if build.family == "nemotron"]
    assert found("code 7b") == ["mlx-community/codegemma-1.1-7b-it-4bit"]
    assert "asks the hub" in run("search", "--catalog", "zzz")[1]
    status, _, said = run("search")
    assert status == 2 and "--catalog" in said
