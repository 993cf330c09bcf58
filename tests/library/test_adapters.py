"""Installed LoRA adapters: found, listed as models of their own, refused by name, removed."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from app import paths
from app.errors import GryphonError
from app.library import adapters
from app.library.installed import find_model, installed_models

from .test_installed import CONFIG, write_model, write_safetensors

SETTINGS: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0},
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRYPHON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    models = tmp_path / "home" / "data" / "models"
    write_model(models / "base", CONFIG | {"num_hidden_layers": 2})
    return models


def write_adapter(path: Path, layer: int = 1, **settings: Any) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    name = f"model.layers.{layer}.mlp.up_proj.lora_a"
    write_safetensors(path / "adapters.safetensors", {name: ("F32", [4, 2], 32)})
    return path


def names() -> list[str]:
    return [model.name for model in installed_models()]


def refusal(*given: Any) -> GryphonError:
    with pytest.raises(GryphonError) as caught:
        adapters.add(*given)
    assert not [*paths.adapters_dir().iterdir()]  # nothing is left of it
    return caught.value


def test_an_installed_adapter_is_a_model_with_its_own_name(models: Path, tmp_path: Path) -> None:
    given = write_adapter(tmp_path / "mine")
    (given / "0000100_adapters.safetensors").write_bytes(b"a checkpoint of the training")
    added = adapters.add(given, None, "base")
    assert names() == ["base", "base+mine"] and find_model("base+mine") == added
    assert (added.base, added.source, added.family) == ("base", "adapter", "open-llama")
    assert added.ref.path == str(models / "base")
    assert added.ref.adapter == str(models / "adapters" / "mine")
    assert added.size_bytes == find_model("base").size_bytes + 32
    assert find_model().name == "base"  # it is not used when none is named
    kept = models / "adapters" / "mine"
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in [kept, *kept.iterdir()]}
    assert modes == {"mine": 0o700} | dict.fromkeys(
        ("adapter_config.json", "adapters.safetensors", "base.json"), 0o600
    )
    for name in ("mine", "base+mine"):
        adapters.remove(name)
        assert names() == ["base"] and not [*kept.parent.iterdir()]
        adapters.add(given, None, "base")


def test_the_base_is_the_one_the_training_named_if_it_is_installed(
    models: Path, tmp_path: Path
) -> None:
    by_path = write_adapter(tmp_path / "a", model=str(models / "base"))
    by_name = write_adapter(tmp_path / "b", model="base")
    unknown = write_adapter(tmp_path / "c", model="org/other")
    silent = write_adapter(tmp_path / "d")
    assert (
        "'org/other'" in refusal(unknown).message and "Installed: base" in refusal(unknown).message
    )
    assert "does not say which" in refusal(silent).message
    assert adapters.add(by_path).name == "base+a"
    assert adapters.add(by_name).name == "base+b"


def test_what_is_wrong_is_refused_before_anything_is_copied(models: Path, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good")
    assert "letters, digits" in refusal(good, "../x", "base").message
    assert "letters, digits" in refusal(good, ".hidden", "base").message
    assert "'nope'" in refusal(good, None, "nope").message
    assert "not a directory" in refusal(tmp_path / "nowhere", None, "base").message
    deep = write_adapter(tmp_path / "deep", layer=2)
    assert "changes a layer 3 and the model has 2" in refusal(deep, None, "base").message
    kind = write_adapter(tmp_path / "kind", fine_tune_type="ia3")
    assert refusal(kind, None, "base").code == "invalid_model"
    cut = write_adapter(tmp_path / "cut")
    file = cut / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in refusal(cut, None, "base").message


def test_a_name_that_is_taken_and_an_adapter_on_an_adapter_are_refused(
    models: Path, tmp_path: Path
) -> None:
    given = write_adapter(tmp_path / "mine")
    adapters.add(given, None, "base")
    with pytest.raises(GryphonError, match="installed already"):
        adapters.add(given, None, "base")
    with pytest.raises(GryphonError, match="has an adapter on it already"):
        adapters.add(given, "two", "base+mine")
    assert names() == ["base", "base+mine"]


def test_an_adapter_without_its_base_is_no_model_and_says_why(models: Path, tmp_path: Path) -> None:
    adapters.add(write_adapter(tmp_path / "mine"), None, "base")
    (models / "base").rename(models / "renamed")
    assert names() == ["renamed"]
    with pytest.raises(GryphonError, match="goes with base, which is not installed"):
        find_model("base+mine")
    assert adapters.installed_names() == [("mine", "base")]
    adapters.remove("mine")
    with pytest.raises(GryphonError, match="Installed: none"):
        adapters.remove("mine")


def test_no_name_from_a_request_reaches_a_path(models: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside")
    for name in (f"base+{tmp_path}/outside", "base+../../outside", str(tmp_path / "outside")):
        with pytest.raises(GryphonError) as caught:
            find_model(name)
        assert caught.value.code == "model_not_found"


def test_a_layer_without_end_in_a_name_keeps_no_model_from_the_list(models: Path) -> None:
    """int() refuses more than 4300 digits."""
    path = write_adapter(paths.adapters_dir() / "odd")
    (path / "base.json").write_text(json.dumps({"base": "base"}))
    name = f"model.layers.{'9' * 5000}.mlp.up_proj.lora_a"
    write_safetensors(path / "adapters.safetensors", {name: ("F32", [4, 2], 32)})
    assert "base" in names()
    (path / "base.json").write_text("[" * 200_000)
    assert names() == ["base"]


def test_a_link_among_the_adapters_is_removed_and_what_it_links_to_stays(
    models: Path, tmp_path: Path
) -> None:
    mine = write_adapter(tmp_path / "mine")
    (paths.adapters_dir() / "linked").symlink_to(mine)
    adapters.remove("linked")
    assert not [*paths.adapters_dir().iterdir()] and len([*mine.iterdir()]) == 2
